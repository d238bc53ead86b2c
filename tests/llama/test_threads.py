"""Threads beside busy programs: a machine that is made up, and what OpenMP does to a real one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fixture_types import Tiny

from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.llama.threads import Threads, default_threads


class Machine:
    """Steps on cores of which others keep some busy.

    With more threads than free cores, all wait for those that have none: a step takes four times as
    long.
    """

    def __init__(self, cores: int) -> None:
        self.threads = Threads(cores)
        self.cores = cores
        self.now = 0.0

    def run(self, seconds: float, n_busy: int) -> list[int]:
        """Return the number of threads at each step."""
        numbers, end = [], self.now + seconds
        while self.now < end:
            n = self.threads.n
            numbers.append(n)
            is_slow = n > self.cores - n_busy
            wall = (0.08 if is_slow else 0.02) * self.cores / n
            got = n - (0.6 * (n - self.cores + n_busy) if is_slow else 0.0)
            self.now += wall
            self.threads.note(wall, wall * got, self.now)
        return numbers


@pytest.mark.parametrize("cores", [2, 4, 8])
def test_a_quiet_machine_keeps_all_threads(cores: int) -> None:
    assert set(Machine(cores).run(20, 0)) == {cores}


@pytest.mark.parametrize(("cores", "n_busy"), [(2, 1), (4, 1), (4, 2), (8, 3)])
def test_threads_leave_cores_to_others_and_come_back(cores: int, n_busy: int) -> None:
    machine = Machine(cores)
    machine.run(3, 0)
    machine.run(4, n_busy)
    numbers = machine.run(20, n_busy)
    free = cores - n_busy
    assert set(numbers) <= {free, free + 1}  # one more is tried now and then
    assert numbers.count(free) > 0.95 * len(numbers)
    machine.run(5, 0)
    assert machine.threads.n >= free + 1  # within five seconds
    machine.run(5 * n_busy, 0)
    assert machine.threads.n == cores


def test_one_thread_is_left_on_a_machine_that_is_full() -> None:
    machine = Machine(2)
    numbers = machine.run(30, 2)
    assert min(numbers) == 1
    assert numbers[-1] in (1, 2)


def test_a_number_that_was_chosen_stays(tiny: Tiny) -> None:
    model = Model(tiny("llama"))
    with Context(model, n_ctx=256, n_sequences=1, n_threads=2) as chosen:
        assert chosen._watch is None
    with Context(model, n_ctx=256, n_sequences=1) as free:
        assert (free._watch is None) == (default_threads() == 1)
    model.close()


def test_a_context_does_what_the_watch_says(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr("amulet_gguf.llama.context.default_threads", lambda: 3)
    model = Model(tiny("llama"))
    with Context(model, n_ctx=256, n_sequences=1) as context:
        assert context._watch is not None
        monkeypatch.setattr(context._watch, "note", lambda *_: True)
        rows = []
        for n in (3, 1, 2):
            context._watch.n = n
            context.clear()
            context.add(0, np.arange(5, 60, dtype=np.int32), output=True)
            rows.append(context.decode().copy())
            assert context.n_threads == n
        context.clear()
        context.add(0, np.arange(5, 60, dtype=np.int32), output=True)
        rows.append(context.decode().copy())
    for row in rows:
        np.testing.assert_allclose(row, rows[0], atol=0.05)
    model.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells")
@pytest.mark.parametrize("bound", [{"GOMP_CPU_AFFINITY": "0"}, {"OMP_PROC_BIND": "true"}])
def test_cores_are_counted_before_openmp_binds_threads(bound: dict[str, str]) -> None:
    code = (
        "from amulet_gguf.llama.context import Context;"
        "from amulet_gguf.llama.threads import default_threads; print(default_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **bound}, capture_output=True, text=True
    )
    assert int(done.stdout) == default_threads()


def test_threads_never_outnumber_cores() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
