"""The one decorator under which the package compiles its Numba kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(*, fastmath: bool | set[str] = False) -> Callable[[Function], Function]:
    """Compile a function on its first call, without the GIL, and keep the machine code on disk.

    Numba keeps it beside the module, or in the user's cache folder where the package is read-only.
    Where neither can be written, it compiles anew in every process instead of failing.
    """

    def compile(function: Function) -> Function:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            compiled: Function = njit(cache=True, **options)(function)
        except RuntimeError:  # "cannot cache function: no locator available"
            compiled = njit(**options)(function)
        return compiled

    return compile
