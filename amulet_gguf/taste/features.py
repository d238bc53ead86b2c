"""What a preference makes of an answer: how much likelier the model finds it with than without."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Final

import numpy as np

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.likelihood import Likelihood
from amulet_gguf.method.arrays import Float64Array, Tokens
from amulet_gguf.prompts.template import Message, with_preference
from amulet_gguf.settings import Settings

#: Tokens of an answer that are read: style shows early, and reading takes time.
MAX_TOKENS: Final = 128
#: Of one token, in nats: the plausibility mask of the default cuts at as much.
MAX_RATIO: Final = -math.log(0.2)


def log_ratios(
    amulet: Amulet,
    messages: Sequence[Message],
    answers: Sequence[str],
    attributes: Sequence[str],
) -> Generator[tuple[int, int], None, Float64Array]:
    """Return log P(token | preference) - log P(token), as means over the tokens of answers, in nats.

    A generator, because the thread that makes an engine's steps must do it, and has others to serve: it
    reads an answer at a time, yields how many were read and of how many, and returns the numbers,
    (answers, attributes) float64. Each token's is within `MAX_RATIO`, and an empty answer's are 0.

    Args:
        messages: what was answered: the last is the user's.
        attributes: texts of preferences.

    Raises:
        PromptError: the messages make no prompt.
        EngineError: no memory, or llama.cpp fails.
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
    with Likelihood(model, n_ctx=n_ctx, n_prompts=2, n_threads=amulet.engine.n_threads) as likelihood:
        plain: list[Float64Array] = []
        for column, prompt in enumerate(prompts, -1):
            for row, answer in enumerate(tokens):
                chances = likelihood.log_likelihood(prompt, answer)
                if column < 0:
                    plain.append(chances)
                elif len(answer):
                    ratios = np.clip(chances - plain[row], -MAX_RATIO, MAX_RATIO)
                    found[row, column] = ratios.mean()
                yield (column + 1) * len(answers) + row + 1, total
    return found
