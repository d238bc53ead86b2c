"""Methods by name, as changes of settings: what the commands compare, and an evaluation measures."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from amulet_gguf.declaration import find
from amulet_gguf.errors import SettingError
from amulet_gguf.settings import SETTINGS, Settings

#: Strength of Linear Alignment: 1 + the ratio of 2 that its reference implementation uses.
LINEAR_ALIGNMENT: Final = 3.0
#: What each changes in the settings that all share.
METHODS: Final[Mapping[str, Mapping[str, Any]]] = {
    "base": {"prefer": (), "avoid": None, "strength": 0.0},
    "prompting": {"strength": 1.0, "fade": 0.0},
    "linear-alignment": {
        "strength": LINEAR_ALIGNMENT,
        "fade": 0.0,
        "withhold_echo": False,
        "protect_facts": False,
    },
    "amulet": {},
}
_CHANGE: Final = re.compile(r",(?=\s*[a-z_-]+=)")  # a comma of a JSON value is followed by no FIELD=


@dataclass(frozen=True)
class Auto:
    """What models up to some size bear, as blind readers found (`evaluation/README.md`)."""

    n_parameters: float
    strength: float
    fade: float
    fade_to: float


AUTO: Final = (
    Auto(0.3e9, 1.0, 0.0, 1.0),  # every amplification lost to prompting
    Auto(math.inf, 6.65, 48.0, 2.0),
)


def auto_for(n_parameters: int) -> Auto:
    """Return what a model of so many parameters bears."""
    return next(each for each in AUTO if n_parameters <= each.n_parameters)


def describe_auto(n_parameters: int) -> str:
    """Say in a line what is chosen for a model, and why."""
    auto = auto_for(n_parameters)
    what = f"{auto.strength:g}"
    if auto.fade:
        what += f", fading to {auto.fade_to:g} ({auto.fade:g} tokens)"
    known = [each.n_parameters for each in AUTO if not math.isinf(each.n_parameters)]
    size = (
        f"at most {auto.n_parameters / 1e9:g}"
        if auto is not AUTO[-1]
        else f"more than {known[-1] / 1e9:g}"
    )
    return (
        f"{what}: what readers preferred with models of {size} billion parameters; this one has "
        f"{n_parameters / 1e9:.2g}"
    )


def resolve(settings: Settings, n_parameters: int) -> Settings:
    """Return settings with numbers for what is left to the model."""
    auto = auto_for(n_parameters)
    return settings.replace(
        strength=auto.strength if settings.strength is None else settings.strength,
        fade=auto.fade if settings.fade is None else settings.fade,
        fade_to=auto.fade_to if settings.fade_to is None else settings.fade_to,
    )


def named(name: str, shared: Settings) -> Settings:
    """Return the settings of a method of `METHODS`, or of "paper".

    Raises:
        SettingError: there is no such method.
    """
    if name == "paper":
        return Settings.paper().replace(max_tokens=shared.max_tokens)
    if name not in METHODS:
        raise SettingError(
            f"there is no method {name!r}: choose from {', '.join([*METHODS, 'paper'])}, or "
            "describe one, as strong:strength=8,temperature=0.7"
        )
    return dataclasses.replace(shared, **METHODS[name])


def four(settings: Settings) -> dict[str, Settings]:
    """Return the settings of all `METHODS`, by their names for people."""
    return {name.replace("-", " "): named(name, settings) for name in METHODS}


def method(written: str, shared: Settings) -> tuple[str, Settings]:
    """Return name and settings of a method as it is written on the command line.

    That is a name that `named` knows, or `NAME:CHANGE,CHANGE…`: each change is FIELD=VALUE, a field of
    `Settings` and a value as `amulet_gguf.declaration.Setting.parse` reads it, or one of those names to
    begin with.

    Raises:
        SettingError: no such method or field, or no such value.
    """
    name, colon, changes = written.partition(":")
    if not colon:
        return name, named(name, shared)
    if not name:
        raise SettingError(f"a method needs a name before its settings: {written!r}")
    settings = shared
    for number, change in enumerate(_CHANGE.split(changes)):
        first, comma, rest = change.partition(",")
        if number == 0 and "=" not in first:
            settings = named(first, shared)
            if not comma:
                continue
            change = rest
        field, equals, value = change.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or field == "prefer":
            raise SettingError(f"method {name!r}: {change!r} does not set a field of the settings")
        parsed = find(field, SETTINGS).parse(field, value)
        settings = dataclasses.replace(settings, **{field: parsed})
    return name, settings
