"""Questions about a model that somebody waits for, while its threads do other things."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Generic, TypeVar

from amulet_gguf.amulet import Amulet

T = TypeVar("T")


class Look(Generic[T]):
    """Something to be asked of a model that waits for its turn among answers to be planned."""

    def __init__(self, make: Callable[[Amulet], T]) -> None:
        self._make = make
        self.future: Future[T] = Future()

    def settle(self, amulet: Amulet | None, otherwise: BaseException) -> None:
        """Ask it, if anybody still waits; without a model, fail."""
        if amulet is None:
            settle(self.future, error=otherwise)
        elif not self.future.cancelled():
            try:
                settle(self.future, self._make(amulet))
            except BaseException as error:
                settle(self.future, error=error)


def settle(future: Future[Any], result: object = None, error: BaseException | None = None) -> None:
    """Give a future its result or its error, unless it was cancelled."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
