"""People as judges: a page on which answers are ranked blind, and what their ranks say.

A group is all answers to one question for one preference. Neither the page nor a file of ranks names a
method: an answer is known by a digest of its text.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Final

from amulet_gguf.batch.records import digest
from amulet_gguf.errors import BatchError, shown
from amulet_gguf.evaluation.table import Value
from amulet_gguf.home.files import read_file, write_atomically
from amulet_gguf.preferences import Preference

_FORMAT: Final = "amulet-ranks"
_MAX_BYTES: Final = 2**24
_MAX_PAGE: Final = 2**28
_PAGE: Final = "reading.html"


@dataclass(frozen=True)
class Group:
    """What a reader ranks at once.

    Attributes:
        question: its number.
        texts: the answers by their digests, in no order that means anything.
        methods: what wrote each text, by its digest; equal texts are shown once.
    """

    question: int
    prompt: str
    preference: str
    texts: Mapping[str, str]
    methods: Mapping[str, Sequence[str]]

    @property
    def id(self) -> str:
        return digest([self.prompt, self.preference, sorted(self.texts)])


def make_groups(answers: Sequence[tuple[int, str, str, str, str]]) -> list[Group]:
    """Return the groups of answers, each a question's number, prompt, preference, method and text."""
    found: dict[tuple[int, str, str], dict[str, list[str]]] = {}
    for question, prompt, preference, method, text in answers:
        found.setdefault((question, prompt, preference), {}).setdefault(text.strip(), []).append(method)
    groups = []
    for (question, prompt, preference), texts in found.items():
        ids = {digest([prompt, preference, text]): text for text in texts}
        order = sorted(ids)  # by digests: as good as shuffled, and the same in every run
        groups.append(
            Group(
                question,
                prompt,
                preference,
                {each: ids[each] for each in order},
                {each: texts[ids[each]] for each in order},
            )
        )
    return groups


def write_page(folder: Path, groups: Sequence[Group]) -> Path:
    """Write the page, HTML that needs nothing else and shuffles for each reader anew; return its path.

    Raises:
        OSError: it cannot be written.
    """
    order = list(groups)
    random.Random(0).shuffle(order)
    data = [
        {
            "id": group.id,
            "question": group.prompt,
            "wanted": Preference.parse(group.preference).text,
            "answers": [{"id": each, "text": text} for each, text in group.texts.items()],
        }
        for group in order
    ]
    html = resources.files("amulet_gguf.evaluation").joinpath("reading.html").read_text("utf-8")
    script = html.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content = json.dumps({"format": _FORMAT, "groups": data}).replace("<", "\\u003c")
    path = folder / _PAGE
    write_atomically(path, html.replace("SCRIPT-HASH", allowed).replace("DATA", content, 1))
    return path


@dataclass(frozen=True)
class Ranks:
    """What one reader said.

    Attributes:
        places: by a group's id, the place of each answer from 0, the best; equal places are ties.
        broken: by a group's id, the answers that are nonsense.
    """

    places: Mapping[str, Mapping[str, int]]
    broken: Mapping[str, frozenset[str]]

    def covers(self, group: Group) -> bool:
        """All answers of the group are ranked."""
        return set(self.places.get(group.id, ())) == set(group.texts)


def read_ranks(folder: Path) -> list[Ranks]:
    """Return the ranks of all readers: files ranks*.json in the folder, the newest of each name.

    Raises:
        BatchError: one of them is not what the page exports.
    """
    paths = sorted(folder.glob("ranks*.json"), key=lambda path: path.stat().st_mtime_ns)
    return list(dict(map(_ranks, paths)).values())


def _ranks(path: Path) -> tuple[str, Ranks]:
    try:
        content = json.loads(read_file(path, _MAX_BYTES))
        if content["format"] != _FORMAT:
            raise ValueError("it is of another format")
        places = {
            str(each["group"]): {
                str(answer): place for place, tied in enumerate(each["order"]) for answer in tied
            }
            for each in content["ranks"]
        }
        broken = {str(each["group"]): frozenset(map(str, each["broken"])) for each in content["ranks"]}
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = shown(str(error))
        raise BatchError(
            f"{path} is not what the reading page exports ({reason}): export again"
        ) from None
    return str(content.get("reader") or path.name), Ranks(places, broken)


def reader_values(groups: Sequence[Group], readers: Sequence[Ranks], against: str) -> Iterator[Value]:
    """Yield what the readers found of each answer, as means over those who ranked its whole group.

    Args:
        against: the method that the others are compared to.
    """
    for group in groups:
        whole = [ranks for ranks in readers if ranks.covers(group)]
        places = [ranks.places[group.id] for ranks in whole]
        writers = {method: each for each, methods in group.methods.items() for method in methods}
        for method, text in writers.items():
            others = [other for other in group.texts if other != text]
            found = {
                "read_wins": [_won(told, text, writers[against]) for told in places]
                if against in writers and method != against
                else [],
                "read_broken": [float(text in ranks.broken[group.id]) for ranks in whole],
                "read_agreement": [
                    float(_won(first, text, other) == _won(second, text, other))
                    for first, second in itertools.combinations(places, 2)
                    for other in others
                ],
            }
            for measure, numbers in found.items():
                if numbers:
                    yield Value(group.question, method, group.preference, measure, fmean(numbers))


def preferred_pairs(folder: Path) -> list[tuple[str, str, str]]:
    """Return what readers preferred in a folder: question, better answer, worse one.

    Of each group that a reader ranked, answers in neighbouring places are compared, unless one is
    broken; of several readers, most must agree.

    Raises:
        BatchError: there is no reading page, it is damaged, or a file of ranks is.
    """
    path = folder / _PAGE
    try:
        page = read_file(path, _MAX_PAGE).decode()
        data = page.partition('<script type="application/json" id="data">')[2]
        groups = json.loads(data.partition("</script>")[0])["groups"]
        texts = {
            str(group["id"]): {str(each["id"]): str(each["text"]) for each in group["answers"]}
            for group in groups
        }
        questions = {str(group["id"]): str(group["question"]) for group in groups}
    except FileNotFoundError:
        raise BatchError(f"there is no {path}: amulet eval --read writes it") from None
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise BatchError(f"{path} is damaged ({shown(str(error))}): write it again") from None
    votes: Counter[tuple[str, str, str]] = Counter()
    for ranks in read_ranks(folder):
        for group, places in ranks.places.items():
            answers, broken = texts.get(group, {}), ranks.broken[group]
            for one, other in itertools.combinations(sorted(places.keys() & answers.keys()), 2):
                if abs(places[one] - places[other]) == 1 and not {one, other} & broken:
                    votes[group, one, other] += 1 if places[one] < places[other] else -1
    pairs = [
        (group, one, other) if n > 0 else (group, other, one)
        for (group, one, other), n in votes.items()
        if n
    ]
    return [
        (questions[group], texts[group][better], texts[group][worse]) for group, better, worse in pairs
    ]


def _won(places: Mapping[str, int], one: str, other: str) -> float:
    return 0.5 if places[one] == places[other] else float(places[one] < places[other])
