"""What is served: a model by any name, with settings, profiles and limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from amulet_gguf.home.config import Config
from amulet_gguf.preferences import PRESETS
from amulet_gguf.server.asked import Asked
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.schemas import held
from amulet_gguf.service.service import AmuletService
from amulet_gguf.settings import Settings

#: The name of whatever model is served.
ALIAS: Final = "amulet"
_LATEST: Final = "latest"  # what ollama's clients put behind every name


@dataclass(frozen=True)
class Served:
    """What is served, and within which limits.

    Attributes:
        service: with its model loaded.
        name: of the model.
        settings: where requests start from.
        config: profiles that requests may name.
        max_tokens: of one answer.
        n_sequences: branches that one answer may have at most.
        is_strict: other names of the model than its own are refused.
    """

    service: AmuletService
    name: str
    settings: Settings = field(default_factory=Settings)
    config: Config | None = None
    max_tokens: int = 4096
    n_sequences: int = 8
    is_strict: bool = False

    @property
    def n_slots(self) -> int:
        """Answers with one preference each that are written at once."""
        return max(1, self.n_sequences // 2)

    @property
    def profiles(self) -> Sequence[str]:
        return [] if self.config is None else list(self.config.profiles)

    @property
    def suffixes(self) -> Sequence[str]:
        """What may follow the name of the model after a colon."""
        return list(dict.fromkeys([*self.profiles, *PRESETS]))

    def named(self, asked: str | None) -> tuple[str, str | None]:
        """Return the name to report for a name that was asked for, and its suffix.

        Raises:
            RequestError: there is no such suffix, or no such model where names are strict.
        """
        if not asked or self._is_own(asked):
            return self.name, None
        base, colon, suffix = asked.rpartition(":")
        if not colon:
            base, suffix = asked, _LATEST
        if suffix in self.suffixes and (not self.is_strict or self._is_own(base)) and base:
            return f"{self.name}:{suffix}", suffix
        if suffix == _LATEST and base and (not self.is_strict or self._is_own(base)):
            return self.name, None
        message = f"there is no model {asked[:100]!r} here: {self.name} is served (GET /v1/models)"
        raise RequestError(404, message, code="model_not_found", param="model")

    def _is_own(self, asked: str) -> bool:
        asked = asked.lower().removeprefix("openai/").removesuffix(".gguf")
        return bool(asked) and (asked == ALIAS or self.name.lower().startswith(asked))

    def settings_for(self, asked: Asked) -> Settings:
        """Return the settings of a request, within the limits.

        Raises:
            RequestError, SettingError: a name or a value that is not possible.
        """
        changes = dict(asked.changes)
        settings = self._start(asked)
        if changes.get("max_tokens", 1) is None:
            changes["max_tokens"] = self.max_tokens
        if isinstance(changes.get("schema"), dict):
            changes["schema"] = held(changes["schema"], "schema", is_strict=True)
        settings = dataclasses.replace(settings, **changes)
        most = self.max_tokens if settings.think_tokens is None else settings.think_tokens
        settings = settings.replace(
            max_tokens=min(settings.max_tokens, self.max_tokens),
            min_tokens=min(settings.min_tokens, settings.max_tokens, self.max_tokens),
            think_tokens=min(most, self.max_tokens),
        )
        if asked.messages is not None and any(m["role"] == "system" for m in asked.messages):
            settings = settings.replace(system=None)
        if settings.n_branches > self.n_sequences:
            message = f"this server takes at most {self.n_sequences - 1} preferences"
            raise RequestError(400, message, code="invalid_value", param="prefer")
        return settings

    def _start(self, asked: Asked) -> Settings:
        """Return what a request starts from: a profile goes before the suffix of the name."""
        _, suffix = self.named(asked.model)
        name = asked.profile or suffix
        if name is None:
            return self.settings
        if self.config is not None and name in self.config.profiles:
            return self.config.settings(name, self.settings)
        if name != suffix:
            raise RequestError(400, f"there is no profile {name[:64]!r}", param="profile")
        return self.settings.replace(prefer=name)
