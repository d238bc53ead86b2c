"""What is compared: questions, and the records that answer every question by every method."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from amulet_gguf.batch.records import Record, read_input
from amulet_gguf.errors import BatchError
from amulet_gguf.preferences import as_preferences
from amulet_gguf.settings import Settings


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
