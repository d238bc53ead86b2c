"""Errors go from one process to another as they are."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from functools import partial

import pytest

from amulet_gguf import errors
from amulet_gguf.errors import AmuletError


def kinds(kind: type[AmuletError] = AmuletError) -> list[type[AmuletError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in kinds(child))]


#: What those are made of that take something else than a message.
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "PromptTooLongError": (700, 512),
    "QueueFullError": (3,),
    "SettingError": ("seed must be a number", "seed"),
}
KINDS = [kind for kind in kinds() if kind.__module__ == errors.__name__]
WAYS: dict[str, Callable[[AmuletError], AmuletError]] = {"copy": copy.copy, "deepcopy": copy.deepcopy}


def pickled(protocol: int, error: AmuletError) -> AmuletError:
    found = pickle.loads(pickle.dumps(error, protocol))
    assert isinstance(found, AmuletError)
    return found


for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    WAYS[f"pickle {protocol}"] = partial(pickled, protocol)


def seen(error: BaseException) -> tuple[object, ...]:
    return type(error), error.args, str(error), vars(error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_survive(kind: type[AmuletError], way: str) -> None:
    error = kind(*ARGUMENTS.get(kind.__name__, ("of 3 tokens: shorten it",)))
    error.model = "tiny"  # type: ignore[attr-defined]
    again = WAYS[way](error)
    assert again is not error
    assert seen(again) == seen(error)
    assert str(error)


def test_errors_come_out_of_processes() -> None:
    made = [kind(*ARGUMENTS.get(kind.__name__, ("why",))) for kind in KINDS]
    here, there = multiprocessing.get_context("spawn").Pipe()
    with here, there:
        there.send(made)
        assert list(map(seen, here.recv())) == list(map(seen, made))
