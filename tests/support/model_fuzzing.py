"""Mutants of models, tried one after another: which of them end or hang the process that tries them?"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Final

import tiny_models
from gguf_mutants import File, mutant, parse

from amulet_gguf.errors import AmuletError

#: Seconds for a model that takes some ten milliseconds if nothing is wrong.
PATIENCE: Final = 30
_MAX_OWN: Final = 160  # characters of a message that are not the file's
_MEMORY: Final = 4 * 2**30
_TEXT: Final = "Hello é 🙂 \n\t 漢\x00."


@dataclass(frozen=True)
class Trial:
    """What became of a mutant.

    Attributes:
        change: how it differs from a well-formed file.
        outcome: "checked" (refused before llama.cpp saw it), "refused", "works", "died" or "hung".
        said: the message of an error, with MODEL for its path, or the last words of the process.
    """

    number: int
    change: str
    outcome: str
    said: str

    @property
    def is_bad_message(self) -> bool:
        """Whether a message is no line that can be printed, or quotes more than 200 characters."""
        is_long = len(self.said) > 200 + _MAX_OWN
        return self.outcome in ("checked", "refused") and (is_long or not self.said.isprintable())


def _try(path: Path) -> tuple[str, str]:
    from amulet_gguf.llama.context import Context
    from amulet_gguf.llama.model import Model

    try:
        with Model(path) as model:
            model.special_texts()
            ends = model.end_tokens
            for token in range(model.n_vocab):
                model.token_bytes(token)
            tokens = model.tokenize(_TEXT, special=True)
            context = Context(model, n_ctx=256, n_sequences=2, n_threads=1)
            try:
                context.add(0, tokens[:64] if len(tokens) else ends[:1], output=True)
                rows = context.decode()
                context.copy(0, 1)
                context.add(1, rows.argmax(axis=1).astype("int32"), output=True)
                context.decode()
            finally:
                context.close()
    except AmuletError as error:
        return "refused", str(error)
    return "works", ""


def _serve(requests: Connection, words: str) -> None:
    """Try what is asked for, in a process of its own; what it says on stderr goes to a file."""
    os.dup2(os.open(words, os.O_WRONLY), 2)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError):
        while True:
            requests.send(_try(Path(requests.recv())))


class Workers:
    """A process that tries models, and another one when it dies."""

    def __init__(self, folder: Path) -> None:
        self._words = folder / "stderr"
        self._process: multiprocessing.process.BaseProcess | None = None
        self._answers: Connection | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> Connection:
        if self._answers is None:
            spawn = multiprocessing.get_context("spawn")
            self._words.write_bytes(b"")
            self._answers, theirs = spawn.Pipe()
            self._process = spawn.Process(target=_serve, args=(theirs, str(self._words)), daemon=True)
            self._process.start()
            theirs.close()
        return self._answers

    def _end(self) -> int | None:
        process, answers = self._process, self._answers
        self._process = self._answers = None
        if answers is not None:
            answers.close()
        if process is None:
            return None
        process.join(1)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        return code

    def try_model(self, path: Path) -> tuple[str, str]:
        """Return an outcome and what was said."""
        try:
            answers = self._begin()
            answers.send(str(path))
            if not answers.poll(PATIENCE):
                self._end()
                return "hung", f"no token within {PATIENCE} seconds"
            outcome, said = answers.recv()
        except (EOFError, OSError):
            code = self._end()
            words = self._words.read_text("utf-8", "replace").strip().splitlines()
            return "died", f"{code}: {' | '.join(words[-3:])}"[:400]
        return str(outcome), str(said)


def sources(folder: Path) -> dict[str, File]:
    """Return the well-formed files, by architecture."""
    return {
        name: parse(tiny_models.build(name, folder / f"{name}.gguf").read_bytes())
        for name in tiny_models.ARCHITECTURES
    }


def trials(seed: int, count: int, killers: Path | None = None) -> Iterator[Trial]:
    """Try mutants of all architectures in turn.

    Args:
        killers: where to save those that end or hang the process.
    """
    from amulet_gguf.llama.checks import check

    with tempfile.TemporaryDirectory() as name, Workers(Path(name)) as workers:
        folder = Path(name)
        path = folder / "mutant.gguf"
        files = sources(folder)
        for number in range(count):
            random = Random(f"{seed} {number}")
            architecture = list(files)[number % len(files)]
            change, data = mutant(files[architecture], random)
            path.unlink(missing_ok=True)  # the last one may still be mapped
            path.write_bytes(data)
            try:
                check(path)
            except AmuletError as error:
                outcome, said = "checked", str(error)
            else:
                outcome, said = workers.try_model(path)
            if killers is not None and outcome in ("died", "hung"):
                killers.mkdir(parents=True, exist_ok=True)
                (killers / f"{seed}-{number}.gguf").write_bytes(data)
            said = said.replace(str(path), "MODEL")
            yield Trial(number, f"{architecture}: {change}", outcome, said)
