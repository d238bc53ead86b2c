"""Mutants of models: none ends or hangs the process; `scripts/fuzz models` tries more of them."""

from __future__ import annotations

from collections import Counter

import pytest
from model_fuzzing import trials


@pytest.mark.parametrize("seed", [1])
def test_no_mutant_ends_or_hangs_the_process(seed: int) -> None:
    tried = list(trials(seed, 150))
    assert not [trial for trial in tried if trial.outcome in ("died", "hung") or trial.is_bad_message]
    # Each way out is taken by some: the mutants are neither all alike nor all hopeless.
    assert min(Counter(trial.outcome for trial in tried).values()) > 15
