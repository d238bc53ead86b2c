"""What is preferred, and how strongly: presets, free text and weights."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeGuard

from amulet_gguf.errors import SettingError, shown

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
_NAME_OF: Final = {text: name for name, text in PRESETS.items()}
#: Each preference costs a sequence: a row more in every step, and a KV cache of its own.
MAX_PREFERENCES: Final = 8
MAX_WEIGHT: Final = 10.0
_MAX_TEXT: Final = 10_000

# A weight after a digit is none: "answer in the ratio 2:1" is a text.
_WEIGHTED: Final = re.compile(r"(?P<text>.*[^\d\s]):(?P<weight>[^\s:]+)", re.DOTALL)


def _refused(message: str) -> SettingError:
    return SettingError(message, "prefer")


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
        if not isinstance(self.text, str):
            raise _refused(f"a preference must be a text, got {shown(self.text)}")
        text = self.text.strip()
        if not text:
            raise _refused(f"a preference is empty: name one of {', '.join(PRESETS)}, or write one")
        if len(text) > _MAX_TEXT:
            raise _refused(f"a preference may have {_MAX_TEXT} characters, got {len(text)}")
        is_number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not is_number or not -MAX_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise _refused(
                f"the weight of preference {text!r} must be a number from {-MAX_WEIGHT:g} to "
                f"{MAX_WEIGHT:g}, got {shown(self.weight)}"
            )
        name = text.lower()
        if name in PRESETS:
            text = PRESETS[name]
        elif "," in name and all(part.strip() in PRESETS for part in name.split(",")):
            raise _refused(f"{text!r} names several preferences: give each by itself")
        elif len(name.split()) == 1 and (
            near := difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.75)
        ):
            raise _refused(
                f"there is no preference {text!r}; did you mean {near[0]!r}? To use the word as it "
                f'is, write a sentence ("Be {text}.")'
            )
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "weight", float(self.weight))

    @property
    def name(self) -> str:
        """The preset's name, or the text."""
        return _NAME_OF.get(self.text, self.text)

    @classmethod
    def parse(cls, written: str) -> Preference:
        """Read `TEXT` or `TEXT:WEIGHT`, as typed on a command line ("formal:0.5").

        Raises:
            SettingError: the text is empty or near a preset, or the weight is out of range.
        """
        match = _WEIGHTED.fullmatch(written.strip()) if isinstance(written, str) else None
        if match:
            try:
                return cls(match["text"], float(match["weight"]))
            except ValueError as error:
                if isinstance(error, SettingError):
                    raise
            if match["text"].strip().lower() in PRESETS:
                raise _refused(
                    f"the weight of {match['text']!r} must be a number, got {match['weight']!r}"
                )
        return cls(written)


#: What `prefer` takes: one preference or several, each as text, as (text, weight) or ready-made.
PreferenceLike: TypeAlias = str | tuple[str, float] | Preference
PreferencesLike: TypeAlias = PreferenceLike | Iterable[PreferenceLike] | None


def as_preferences(prefer: PreferencesLike) -> tuple[Preference, ...]:
    """Return preferences in one form. A text may carry its weight, as in `Preference.parse`.

    Among several, JSON's ways to write a pair are read too: [text, weight] and {"text": …, "weight": …}.

    Raises:
        SettingError: something that is none, or more than `MAX_PREFERENCES`.
    """
    if prefer is None:
        return ()
    if isinstance(prefer, (str, Preference)) or _is_pair(prefer):
        prefer = [prefer]
    if not isinstance(prefer, Iterable) or isinstance(prefer, Mapping):
        raise _refused(f"expected preferences as text or (text, weight), got {shown(prefer)}")
    preferences = tuple(map(_as_preference, prefer))
    if len(preferences) > MAX_PREFERENCES:
        raise _refused(f"at most {MAX_PREFERENCES} preferences, got {len(preferences)}")
    return preferences


def _as_preference(item: object) -> Preference:
    if isinstance(item, Preference):
        return item
    if isinstance(item, str):
        return Preference.parse(item)
    if isinstance(item, Mapping) and "text" in item and item.keys() <= {"text", "weight"}:
        item = (item["text"], item.get("weight", 1.0))
    if isinstance(item, list):
        item = tuple(item)
    if not _is_pair(item):
        raise _refused(f"expected a preference as text or (text, weight), got {shown(item)}")
    return Preference(*item)


def _is_pair(value: object) -> TypeGuard[tuple[str, float]]:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )


def parse_preferences(text: str) -> tuple[Preference, ...]:
    """Read several preferences from a line: names of presets, or sentences with ";" between them.

    Raises:
        SettingError: as `Preference.parse`.
    """
    words = text.replace(",", " ").split()
    if not words or any(word.partition(":")[0].lower() not in PRESETS for word in words):
        words = [part for part in text.split(";") if part.strip()]
    return tuple(map(Preference.parse, words))
