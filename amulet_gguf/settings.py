"""Everything that can be set for one generation, checked when it is set."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypedDict, get_args

from amulet_gguf.errors import SettingError
from amulet_gguf.preferences import Preference, PreferencesLike, as_preferences

if TYPE_CHECKING:
    from typing_extensions import Self

Adapt = Literal["none", "divergence", "entropy"]
Placement = Literal["turn", "system"]

#: The reference implementation's system prompt. It ends in the space that separates the preference.
PAPER_SYSTEM: Final = (
    "You are an AI designed to provide the most helpful, clear, and concise responses. Focus on giving "
    "actionable information, ensuring accuracy and detail without overwhelming the user. You should "
    "also be patient, polite, and calm. Avoid unnecessary complexity and always prioritize practical, "
    "user-friendly advice. "
)

#: Smallest and largest value of each number.
RANGES: Final[dict[str, tuple[float, float]]] = {
    "strength": (-100, 1000),
    "plausibility": (0, 1),
    "max_tokens": (1, 1_000_000),
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0.001, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, 10),
    "repeat_last_n": (0, 65536),
    "seed": (0, 2**64 - 1),
}
_WHOLE: Final = {"max_tokens", "top_k", "repeat_last_n", "seed"}


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments, with the types that are accepted for them."""

    prefer: PreferencesLike
    strength: float
    plausibility: float
    adapt: Adapt
    withhold_echo: bool
    placement: Placement
    system: str | None
    max_tokens: int
    stop: str | Iterable[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None


@dataclass(frozen=True)
class Settings:
    """Settings of one generation. Ranges of the numbers are in `RANGES`.

    Attributes:
        prefer: the preferences; a text, (text, weight) or a list of them is accepted too.
        strength: 0 is the base model, 1 ordinary prompting, more amplifies, less than 0 pushes away.
        plausibility: tokens less than this times as probable as the best under ordinary prompting are
            ruled out before amplifying. It guards extrapolation, and does nothing where there is none
            (positive weights whose sum times strength is at most 1, or no preferences).
        adapt: "none" goes to the full strength at every token; "divergence" as far beyond ordinary
            prompting as the branches differ at this token; "entropy" as far as prompting is uncertain of
            it (see `amulet_gguf.method.adaptive.adapted`). Without extrapolation it does nothing.
        withhold_echo: do not amplify the words of the preferences themselves.
        placement: where branches carry the preference: at the end of the last user message ("turn")
            or of the system prompt ("system").
        system: the system prompt; None leaves it to the chat template.
        max_tokens: length of the answer at most.
        stop: texts before which the answer ends; one text is accepted too.
        temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed:
            see `amulet_gguf.method.sampling.Sampler`.

    Raises:
        SettingError: a value is not of its type or out of its range.
    """

    prefer: tuple[Preference, ...] = ()
    strength: float = 5.65
    plausibility: float = 0.1
    adapt: Adapt = "divergence"
    withhold_echo: bool = True
    placement: Placement = "turn"
    system: str | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.1
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefer", as_preferences(self.prefer))
        if not isinstance(self.stop, Iterable):
            raise SettingError(f"stop must be a text or several, got {self.stop!r}")
        stop: object = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SettingError(f"a stop string must be a text that is not empty, got {text!r}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kind = int if name in _WHOLE else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                noun = "a whole number" if name in _WHOLE else "a number"
                raise SettingError(f"{name} must be {noun} from {low} to {high}, got {value!r}")
        if self.placement not in get_args(Placement):
            raise SettingError(f'placement must be "turn" or "system", got {self.placement!r}')
        if self.adapt not in get_args(Adapt):
            names = ", ".join(get_args(Adapt))
            raise SettingError(f"adapt must be one of {names}, got {self.adapt!r}")
        if not isinstance(self.withhold_echo, bool):
            raise SettingError(f"withhold_echo must be true or false, got {self.withhold_echo!r}")
        if self.system is not None and not isinstance(self.system, str):
            raise SettingError(f"system must be a text or None, got {self.system!r}")
        total = math.fsum(abs(preference.weight) for preference in self.prefer)
        if abs(self.strength) * total > RANGES["strength"][1]:
            raise SettingError(
                f"strength {self.strength:g} times weights of {total:g} is too large: lower one of them"
            )

    @classmethod
    def paper(cls, prefer: PreferencesLike = None) -> Self:
        """Return the settings of the reference implementation (arXiv 2502.19148).

        Its system prompt with the preference at the end, greedy, no mask, the full strength for
        every token, 128 tokens, and the strength
        of alpha = 2, lambda = 2, eta = 10 and 60 iterations. One thing differs on purpose: the prompt
        ends with the template's header of the assistant's turn, which the reference leaves out.
        """
        from amulet_gguf.method.realign import strength

        return cls(
            prefer=as_preferences(prefer),
            strength=strength(),
            plausibility=0.0,
            adapt="none",
            withhold_echo=False,
            placement="system",
            system=PAPER_SYSTEM,
            repeat_penalty=1.0,
            max_tokens=128,
        )
