"""What a preference makes of an answer: how much likelier the model finds it with than without."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Final, TypeVar

import numpy as np

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.likelihood import Likelihood
from amulet_gguf.errors import NonFiniteLogitsError, PromptTooLongError
from amulet_gguf.method.arrays import Float64Array, Tokens
from amulet_gguf.prompts.messages import Message, with_preference
from amulet_gguf.settings import Settings
from amulet_gguf.taste.learning import MAX_RATIO

T = TypeVar("T")
#: Tokens of an answer that are read: style shows early, and reading takes time.
MAX_TOKENS: Final = 128


def log_ratios(
    amulet: Amulet,
    messages: Sequence[Message],
    answers: Sequence[str],
    attributes: Sequence[str],
) -> Generator[tuple[int, int], None, Float64Array]:
    """Return log P(token | preference) - log P(token), as means over the tokens of answers, in nats.

    A generator, because the thread that makes an engine's steps must do it, and has others to serve: it
    reads a batch at a time, yields how many answers were read and of how many, and returns the numbers,
    (answers, attributes) float64. Each token's is within `MAX_RATIO`, and an empty answer's are 0.

    Args:
        messages: what was answered, a system prompt among them: the last is the user's.
        attributes: texts of preferences.

    Raises:
        PromptError: the messages make no prompt, or one that is too long for the engine's context.
        EngineError: no memory, llama.cpp fails, or the model's logits are no numbers.
    """
    planner, model = amulet.planner, amulet.model
    base = planner.base(None, messages, Settings())
    tokens = [model.tokenize(answer, special=False)[:MAX_TOKENS] for answer in answers]
    prompts: list[Tokens] = [
        planner.template.encode(with_preference(base, text, "turn")).tokens
        for text in (None, *attributes)
    ]
    n_ctx = max(map(len, prompts)) + max(map(len, tokens))
    found = np.zeros((len(answers), len(attributes)))
    total = len(prompts) * len(answers)
    if n_ctx > amulet.engine.n_ctx:
        raise PromptTooLongError(n_ctx, amulet.engine.n_ctx)
    with Likelihood(
        model, n_ctx=n_ctx, n_prompts=2, n_threads=amulet.engine.chosen_threads
    ) as likelihood:
        plain: list[Float64Array] = []
        for column, prompt in enumerate(prompts, -1):
            for row, answer in enumerate(tokens):
                n_read = (column + 1) * len(answers) + row
                chances = yield from _telling((n_read, total), likelihood.reading(prompt, answer))
                if not np.isfinite(chances).all():
                    raise NonFiniteLogitsError("the model's logits hold NaN or infinity")
                if column < 0:
                    plain.append(chances)
                elif len(answer):
                    ratios = np.clip(chances - plain[row], -MAX_RATIO, MAX_RATIO)
                    found[row, column] = ratios.mean()
    return found


def _telling(
    told: tuple[int, int], work: Generator[None, None, T]
) -> Generator[tuple[int, int], None, T]:
    """Do work, yielding the same wherever it yields."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            found: T = done.value
            return found
        yield told
