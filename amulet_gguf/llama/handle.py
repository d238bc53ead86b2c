"""Pointers into llama.cpp, freed once, and never while a call is under way with one.

A model may be closed by one thread while others use it, collected while an answer is written, alive in
threads that the end of the interpreter does not wait for, or copied by a fork, in which llama.cpp's
threads are missing. What holds everywhere: who calls llama.cpp holds the handle meanwhile.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

from amulet_gguf.errors import ClosedError
from amulet_gguf.system.platforms import after_fork

if TYPE_CHECKING:
    from typing_extensions import Self

_PATIENCE: Final = 5.0  # seconds that the end of the interpreter waits for calls under way

T = TypeVar("T")


class Living(Generic[T]):
    """Objects that others keep alive. Threads may add some while one goes through them, unlike through a
    `WeakSet`."""

    def __init__(self) -> None:
        self._references: set[weakref.ref[T]] = set()

    def add(self, each: T) -> None:
        self._references.add(weakref.ref(each, self._references.discard))

    def __len__(self) -> int:
        return len(self._references)

    def __iter__(self) -> Iterator[T]:
        for reference in list(self._references):
            each = reference()
            if each is not None:
                yield each


#: What llama.cpp may be using: handles, and callbacks of a load.
in_use: Living[object] = Living()
_owners: Living[Owner] = Living()
_forgetful: Living[Forgetful] = Living()
_is_used = False
_is_ending = False
_is_forked = False  # from a process that used llama.cpp


class Handle(ctypes.c_void_p):
    """A pointer that is freed when nobody holds it any more: its owner has let go of it, and all calls
    that were given it have returned. Python counts that, without a lock, in any thread."""

    def __init__(
        self, pointer: int, free: Callable[[int], object] | None = None, needs: Handle | None = None
    ) -> None:
        """Take a pointer over.

        Args:
            free: frees it; None: it belongs to what it needs.
            needs: is freed later.
        """
        note_use()
        super().__init__(pointer)
        in_use.add(self)
        # The finalizer holds what is needed: a cycle of garbage is finalized in any order.
        finalizer = weakref.finalize(self, _free, pointer, free, needs, os.getpid())
        finalizer.atexit = False

    __hash__ = object.__hash__  # ctypes takes it away


def note_use() -> None:
    """Have processes that are forked from now on refused: llama.cpp, or a driver of its, runs here."""
    global _is_used
    _is_used = True


def _free(
    pointer: int, free: Callable[[int], object] | None, _needs: Handle | None, process: int
) -> None:
    if free is not None and process == os.getpid():
        free(pointer)


class Owner:
    """What has a handle until it is closed, from any thread; a base of models and contexts."""

    def __init__(self, handle: Handle, name: str) -> None:
        self._handle: Handle | None = handle
        self._name = name
        _owners.add(self)
        if _is_ending:  # it was made meanwhile
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory: it is freed when no call uses it any more."""
        self._handle = None

    @property
    def handle(self) -> Handle:
        """The pointer, to be held for as long as it is used.

        Raises:
            ClosedError: after `close`, and in a process that was forked.
        """
        handle = self._handle
        if handle is None:
            raise closed(f"the {self._name} is closed: load the model again")
        return handle


def closed(message: str) -> BaseException:
    """Return what is raised where something was closed: a ClosedError, which says why.

    When the interpreter ends, threads that it does not wait for end, too: in silence.
    """
    if _is_forked:
        message = (
            'a model cannot be used in a forked process: start it with multiprocessing\'s "spawn", and '
            "load the model there"
        )
    elif _is_ending and threading.current_thread() is not threading.main_thread():
        return SystemExit()
    return ClosedError(message)


def check_process() -> None:
    """See whether a model can be loaded.

    Raises:
        ClosedError: not in this process, which was forked from one that used llama.cpp, or not any more.
    """
    if _is_forked or _is_ending:
        raise closed("the interpreter ends: no model can be loaded any more")


class Forgetful(Protocol):
    """What has threads or locks that a forked process has not."""

    def forget(self) -> None:
        """Be closed, in a forked process, without a lock that was there before."""


def forget_in_child(each: Forgetful) -> None:
    """Have something forgotten where this process is forked."""
    _forgetful.add(each)


def _forget() -> None:
    global _is_forked
    _is_forked = _is_used
    for owner in _owners:
        owner.close()
    for each in _forgetful:
        each.forget()


@atexit.register
def _end() -> None:
    """Free what is left, before the libraries end themselves, and let threads come back from calls that
    are under way: they, and what calls back from there, would find no interpreter."""
    global _is_ending
    _is_ending = True
    for owner in _owners:
        owner.close()
    end = time.monotonic() + _PATIENCE
    while len(in_use) and threading.active_count() > 1 and time.monotonic() < end:
        time.sleep(0.001)


after_fork(_forget)
