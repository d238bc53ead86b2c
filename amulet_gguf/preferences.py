"""What is preferred, and how strongly: presets, free text, weights, and the coefficients they give."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeGuard

from amulet_gguf.errors import SettingError

_NAMES: Final = (
    "complex",
    "concise",
    "creative",
    "formal",
    "pleasant",
    "sycophantic",
    "uplifting",
    "verbose",
)
#: The paper's eight preferences, by name.
PRESETS: Final[dict[str, str]] = {
    name: f"Your answer should be {name} as much as possible." for name in _NAMES
}
#: Each preference costs a sequence: a row more in every step, and a KV cache of its own.
MAX_PREFERENCES: Final = 8
MAX_WEIGHT: Final = 10.0
_MAX_TEXT: Final = 10_000

# A weight after a digit is none: "answer in the ratio 2:1" is a text.
_WEIGHTED: Final = re.compile(r"(?P<text>.*[^\d\s]):(?P<weight>[^\s:]+)", re.DOTALL)


@dataclass(frozen=True)
class Preference:
    """One preference.

    Attributes:
        text: the instruction given to the model; a preset's name is replaced by its text.
        weight: its share of the strength, from -10 to 10; a negative one pushes away from it.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        text = self.text.strip()
        if not text:
            raise SettingError(f"a preference is empty: name one of {', '.join(PRESETS)}, or write one")
        if len(text) > _MAX_TEXT:
            raise SettingError(f"a preference may have {_MAX_TEXT} characters, got {len(text)}")
        if not isinstance(self.weight, (int, float)) or not -MAX_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise SettingError(
                f"the weight of preference {text!r} must be a number from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}, got {self.weight}"
            )
        name = text.lower()
        if name in PRESETS:
            text = PRESETS[name]
        elif len(name.split()) == 1 and (
            near := difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.75)
        ):
            raise SettingError(
                f"there is no preference {text!r}; did you mean {near[0]!r}? To use the word as it "
                f'is, write a sentence ("Be {text}.")'
            )
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "weight", float(self.weight))

    @classmethod
    def parse(cls, written: str) -> Preference:
        """Read `TEXT` or `TEXT:WEIGHT`, as typed on a command line ("formal:0.5").

        Raises:
            SettingError: the text is empty or near a preset, or the weight is out of range.
        """
        match = _WEIGHTED.fullmatch(written.strip())
        if match:
            try:
                return cls(match["text"], float(match["weight"]))
            except ValueError as error:
                if isinstance(error, SettingError):
                    raise
            if match["text"].strip().lower() in PRESETS:
                raise SettingError(
                    f"the weight of {match['text']!r} must be a number, got {match['weight']!r}"
                )
        return cls(written)


#: What `prefer` takes: one preference or several, each as text, as (text, weight) or ready-made.
PreferenceLike: TypeAlias = str | tuple[str, float] | Preference
PreferencesLike: TypeAlias = PreferenceLike | Iterable[PreferenceLike] | None


def as_preferences(prefer: PreferencesLike) -> tuple[Preference, ...]:
    """Return preferences in one form. A text may carry its weight, as in `Preference.parse`.

    Raises:
        SettingError: something that is none, or more than `MAX_PREFERENCES`.
    """
    if prefer is None:
        return ()
    items: Iterable[object]
    if isinstance(prefer, (str, Preference)) or _is_pair(prefer):
        items = [prefer]
    elif isinstance(prefer, Iterable):
        items = prefer
    else:
        raise SettingError(f"expected preferences as text or (text, weight), got {prefer!r}")
    preferences = []
    for item in items:
        if isinstance(item, Preference):
            preferences.append(item)
        elif isinstance(item, str):
            preferences.append(Preference.parse(item))
        elif _is_pair(item):
            preferences.append(Preference(*item))
        else:
            raise SettingError(f"expected a preference as text or (text, weight), got {item!r}")
    if len(preferences) > MAX_PREFERENCES:
        raise SettingError(f"at most {MAX_PREFERENCES} preferences, got {len(preferences)}")
    return tuple(preferences)


def _is_pair(value: object) -> TypeGuard[tuple[str, float]]:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )
