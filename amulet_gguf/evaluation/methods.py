"""What is compared: methods by name, and the records that answer every question by every method."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from amulet_gguf.batch.records import Record, read_input
from amulet_gguf.errors import BatchError, SettingError
from amulet_gguf.preferences import as_preferences
from amulet_gguf.settings import Options, Settings

#: Strength of Linear Alignment: 1 + the ratio of 2 that its reference implementation uses.
LINEAR_ALIGNMENT: Final = 3.0
#: Methods that `method` knows by name, as changes of the settings that all share.
METHODS: Final[dict[str, dict[str, Any]]] = {
    "base": {"strength": 0.0},
    "prompting": {"strength": 1.0},
    "linear-alignment": {"strength": LINEAR_ALIGNMENT, "adapt": "none", "withhold_echo": False},
    "amulet": {},
}


def method(written: str, shared: Settings) -> tuple[str, Settings]:
    """Return name and settings of a method as it is written on the command line.

    That is a name of `METHODS`, "paper", or `NAME:CHANGE,CHANGE…`: each change is FIELD=VALUE, a field
    of `Settings` and a value in JSON or plain text, or one of those names to begin with.

    Raises:
        SettingError: no such method or field.
    """
    name, colon, changes = written.partition(":")
    if not colon:
        return name, _named(name, shared)
    if not name:
        raise SettingError(f"a method needs a name before its settings: {written!r}")
    settings = shared
    for number, change in enumerate(changes.split(",")):
        field, equals, value = change.partition("=")
        field = field.strip().replace("-", "_")
        if number == 0 and not equals:
            settings = _named(change, shared)
        elif field not in Options.__annotations__ or field == "prefer" or not equals:
            raise SettingError(f"method {name!r}: {change!r} does not set a field of the settings")
        else:
            settings = dataclasses.replace(settings, **{field: _value(value)})
    return name, settings


def _named(name: str, shared: Settings) -> Settings:
    if name == "paper":
        return dataclasses.replace(Settings.paper(), max_tokens=shared.max_tokens)
    if name not in METHODS:
        raise SettingError(
            f"there is no method {name!r}: choose from {', '.join([*METHODS, 'paper'])}, or "
            "describe one, as strong:strength=8,temperature=0.7"
        )
    return dataclasses.replace(shared, **METHODS[name])


def _value(written: str) -> Any:
    try:
        return json.loads(written)
    except ValueError:
        return written


def sample_questions(path: Path, n: int | None, seed: int = 0) -> list[str]:
    """Return n questions of a file (see `read_input`), drawn without replacement, or all in order.

    Raises:
        BatchError: the file cannot be read, or a record of it is not one question.
    """
    questions = []
    for record in read_input(path, Settings()):
        if record.prompt is None:
            raise BatchError(f"{path}, record {record.line}: {record.error or 'a question is needed'}")
        questions.append(record.prompt)
    if n is None or n >= len(questions):
        return questions
    return random.Random(seed).sample(questions, n)


def make_records(
    questions: Sequence[str], preferences: Sequence[str], methods: Mapping[str, Settings]
) -> list[Record]:
    """Return a record per question, preference and method, question by question.

    A method that never looks at a preference (strength 0) answers each question once, under the
    preference "".
    """
    records: list[Record] = []
    for number, question in enumerate(questions):
        for name, settings in methods.items():
            for preference in preferences if settings.strength != 0 else [""]:
                prefer = as_preferences(preference or None)
                records.append(
                    Record(
                        line=len(records) + 1,
                        settings=dataclasses.replace(settings, prefer=prefer),
                        prompt=question,
                        extra={"question": number, "method": name, "preference": preference},
                    )
                )
    return records
