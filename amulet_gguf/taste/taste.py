"""A taste: choices between answers, kept with what they were between, and the profile they make."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from amulet_gguf.errors import AmuletError, TasteError
from amulet_gguf.home import config
from amulet_gguf.home.files import locked, read_file, write_atomically
from amulet_gguf.home.paths import tastes_folder
from amulet_gguf.method.arrays import Float64Array
from amulet_gguf.preferences import PRESETS, Preference
from amulet_gguf.taste.learning import MAX_RATIO, Belief, fit

VERSION: Final = 1
#: Attributes of a profile at most: each costs a row in every step.
MAX_KEPT: Final = 3
#: Sureness below which an attribute is left out of the profile.
MIN_SURENESS: Final = 0.5
#: Each costs a prompt to read for every pair of answers.
MAX_ATTRIBUTES: Final = 16
_ALIKE: Final = 0.9  # of the most that a pair can teach: the rest is chance's
_MAX_CHOICES: Final = 1000  # the newest; a file of more is of no use to anyone
_FORMAT: Final = "amulet-taste"
_MAX_BYTES: Final = 256 * 2**20
_NOT_LEARNED: Final = "there is a profile {!r} that was not learned: choose another name"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")  # as a profile's


@dataclass(frozen=True)
class Candidate:
    """An answer that could be chosen.

    Attributes:
        features: by attribute: see `amulet_gguf.taste.features.log_ratios`.
        prefer: text of the preference that it was written with; "": none, or nobody knows.
    """

    text: str
    features: Mapping[str, float]
    prefer: str = ""


@dataclass(frozen=True)
class Choice:
    """Two answers to messages, the last of which is the user's, and which of them is better.

    Attributes:
        model: name of the file of the model that the features are of.
    """

    messages: Sequence[Mapping[str, str]]
    better: Candidate
    worse: Candidate
    model: str = ""

    @property
    def key(self) -> str:
        """What tells it from others."""
        return json.dumps([*map(dict, self.messages), self.better.text, self.worse.text])


@dataclass(frozen=True)
class Weight:
    """What is known of an attribute.

    Attributes:
        text: the attribute.
        mean, deviation: of its weight, for features whose differences have a size of 1.
        sureness: probability, 0.5 to 1, that the weight has this sign.
    """

    text: str
    mean: float
    deviation: float
    sureness: float

    @property
    def name(self) -> str:
        """The preset's name, or the text."""
        return Preference(self.text).name


@dataclass
class Taste:
    """What a person's choices say of their preferences; `open_taste` finds or begins one.

    Attributes:
        name: of it, and of the profile that it makes.
        attributes: texts of preferences that may matter: the presets and the person's own.
        choices: the oldest first.
        has_profile: it made the profile of its name.
    """

    name: str
    attributes: tuple[str, ...] = tuple(PRESETS.values())
    choices: list[Choice] = field(default_factory=list)
    has_profile: bool = False

    def belief(self) -> Belief:
        """Return what the choices say. Those made before there was an attribute say nothing of it."""
        return fit(_differences(self.choices, self.attributes))

    def weights(self) -> list[Weight]:
        """Return what is known of each attribute, the weightiest first."""
        belief = self.belief()
        columns = (belief.mean, belief.deviation, belief.sureness)
        rows = zip(self.attributes, *(column.tolist() for column in columns), strict=True)
        return sorted(itertools.starmap(Weight, rows), key=lambda weight: -abs(weight.mean))

    def preferences(self) -> tuple[Preference, ...]:
        """Return at most `MAX_KEPT` preferences, the weightiest whose signs are known well enough.

        Their weights' sizes sum to 1.
        """
        kept = [each for each in self.weights() if each.sureness >= MIN_SURENESS][:MAX_KEPT]
        total = sum(abs(each.mean) for each in kept)
        shares = [(each.text, round(each.mean / total, 2)) for each in kept]
        return tuple(Preference(text, share) for text, share in shares if share)

    def pair(self, chance: random.Random | None = None) -> tuple[str, str]:
        """Return what to prefer in the two answers to show next: texts of attributes, "" for none.

        It is the pair that is expected to teach most, in an order that tells nothing.
        """
        chance = chance or random.Random()
        arms = ["", *self.attributes]
        belief = self.belief()
        expected = self._expected(arms, belief)
        pairs = list(itertools.combinations(range(len(arms)), 2))
        first, second = np.array(pairs).T
        teaches = belief.information(expected[first] - expected[second])
        best = [
            pair for pair, each in zip(pairs, teaches, strict=True) if each >= _ALIKE * teaches.max()
        ]
        i, j = chance.sample(chance.choice(best), 2)
        return arms[i], arms[j]

    def _expected(self, arms: Sequence[str], belief: Belief) -> Float64Array:
        """Return the features, (arms, attributes), that an answer written for each arm can be
        expected to have: the mean of those seen, and of one that has nothing but its own attribute."""
        expected = np.zeros((len(arms), len(self.attributes)))
        expected[1:] = np.diag(belief.scale)
        n = np.ones(len(arms))
        for choice in self.choices:
            for each in (choice.better, choice.worse):
                if each.prefer in arms:
                    row = arms.index(each.prefer)
                    expected[row] += np.nan_to_num(_row(each, self.attributes))
                    n[row] += 1
        return expected / n[:, None]

    def add(self, *choices: Choice) -> None:
        """Learn from choices: keep them, and make the profile what they say with the others.

        A choice that is there already is not kept twice. What other programs have made of the taste
        meanwhile stays. Of a profile that is there, only the preferences change.

        Raises:
            TasteError, ConfigError: the file or the profile cannot be written. In the second case, the
                choices are kept.
        """
        path = _path(self.name)
        with _locked(path):
            known = _load(path, self.name)
            self.attributes = _merged(known.attributes, self.attributes)
            self.has_profile = known.has_profile
            kept = {each.key: each for each in [*known.choices, *choices]}
            self.choices = list(kept.values())[-_MAX_CHOICES:]
            _save(path, self)
            self._make_profile(path)

    def _make_profile(self, path: Path) -> None:
        is_there = self.name in config.load_config().names
        if is_there and not self.has_profile:
            raise TasteError(_NOT_LEARNED.format(self.name))
        prefer = [_written(preference) for preference in self.preferences()]
        if prefer or is_there:
            config.set_profile_key(self.name, "prefer", prefer)
            if not self.has_profile:
                self.has_profile = True
                _save(path, self)


def open_taste(name: str, own: Iterable[Preference] = ()) -> Taste:
    """Return a taste, or a new one that `Taste.add` will keep.

    Args:
        own: preferences of the person's, which become attributes if they are none yet.

    Raises:
        TasteError: the name is none, the file cannot be used, there are too many attributes, or the
            name is that of a profile that was not learned.
    """
    path = _path(name)
    taste = _load(path, name)
    if name in config.load_config().names and not taste.has_profile:
        raise TasteError(_NOT_LEARNED.format(name))
    taste.attributes = _merged(taste.attributes, [preference.text for preference in own])
    return taste


def _merged(known: Sequence[str], more: Sequence[str]) -> tuple[str, ...]:
    """Return attributes with others; where there are too many, the oldest of the person's own go."""
    found = list(dict.fromkeys([*known, *more]))
    too_many = len(found) - MAX_ATTRIBUTES
    old = [text for text in found if text not in PRESETS.values() and text not in more]
    for text in old[: max(0, too_many)]:
        found.remove(text)
    if len(found) > MAX_ATTRIBUTES:
        raise TasteError(
            f"a taste may have {MAX_ATTRIBUTES} attributes, the presets among them, got {len(found)}: "
            "name fewer of your own"
        )
    return tuple(found)


def forget(name: str) -> None:
    """Remove a taste, with its choices and the profile that it made.

    Raises:
        TasteError: there is none, or it cannot be removed.
        ConfigError: the profile cannot be removed.
    """
    path = _path(name)
    with _locked(path):
        if not os.path.lexists(path):
            raise TasteError(f"there is no taste {name!r} in {path.parent}")
        has_profile = True  # of a damaged one nobody knows
        with contextlib.suppress(TasteError):
            has_profile = _load(path, name).has_profile
        if has_profile and name in config.load_config().names:
            config.remove_profile(name)
        path.unlink()


def _differences(choices: Sequence[Choice], attributes: Sequence[str]) -> Float64Array:
    rows = [_row(each.better, attributes) - _row(each.worse, attributes) for each in choices]
    return np.array(rows).reshape(len(choices), len(attributes))


def _row(candidate: Candidate, attributes: Sequence[str]) -> Float64Array:
    """Return an answer's features, NaN where one is not known, without what they have in common.

    An answer to any instruction at all is likelier under all of them: the median is that.
    """
    found = np.array([candidate.features.get(text, np.nan) for text in attributes])
    return found if np.isnan(found).all() else found - np.nanmedian(found)


def _written(preference: Preference) -> Any:
    """Return a preference as a profile has it: in its short form where that can be read again."""
    short = f"{preference.name}:{preference.weight:g}"
    with contextlib.suppress(AmuletError):
        if Preference.parse(short) == preference:
            return short
    return {"text": preference.text, "weight": preference.weight}


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name) or name == "none":
        raise TasteError(f"{name!r} is not a name for a taste: letters, digits, - and _")
    return tastes_folder() / f"{name}.json"


@contextlib.contextmanager
def _locked(path: Path) -> Any:
    try:
        with locked(path.with_name("tastes")):  # one for all: what is forgotten leaves no name behind
            yield
    except OSError as error:
        raise TasteError(f"{path} cannot be written: {error.strerror or error}") from error


def _save(path: Path, taste: Taste) -> None:
    record = {"format": _FORMAT, "version": VERSION, **dataclasses.asdict(taste)}
    while len(data := json.dumps(record).encode()) >= _MAX_BYTES and record["choices"]:
        record["choices"] = record["choices"][len(record["choices"]) // 2 + 1 :]  # the oldest go
    write_atomically(path, data.decode() + "\n")


def _load(path: Path, name: str) -> Taste:
    """Return a taste; a new one where there is no file."""
    try:
        record = json.loads(read_file(path, _MAX_BYTES))
        if record["format"] != _FORMAT:
            raise ValueError("it is of another format")
        if not isinstance(record["version"], int) or record["version"] > VERSION:
            raise TasteError(
                f"{path} is from a newer amulet (version {record['version']!r}, this one knows "
                f"{VERSION}): update it"
            )
        attributes = tuple(Preference(text).text for text in record["attributes"])
        if not 1 <= len(attributes) <= MAX_ATTRIBUTES:
            raise ValueError(f"it has {len(attributes)} attributes")
        choices = [_choice(each) for each in record["choices"]]
        return Taste(name, attributes, choices, bool(record["has_profile"]))
    except TasteError:
        raise
    except FileNotFoundError:
        return Taste(name)
    except OSError as error:
        raise TasteError(f"{path} cannot be read: {error.strerror or error}") from error
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise TasteError(
            f"{path} is damaged ({reason}): amulet taste {name} --forget begins anew"
        ) from None


def _choice(record: Mapping[str, Any]) -> Choice:
    messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
    return Choice(
        messages, _candidate(record["better"]), _candidate(record["worse"]), str(record["model"])
    )


def _candidate(record: Mapping[str, Any]) -> Candidate:
    features = {str(text): float(value) for text, value in record["features"].items()}
    if not all(abs(value) <= 2 * MAX_RATIO for value in features.values()):
        raise ValueError("a feature is out of range")
    return Candidate(str(record["text"]), features, str(record["prefer"]))
