"""A model that scores answers: how probable it finds them, and which of two it prefers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from amulet_gguf.amulet import load_model
from amulet_gguf.engine.likelihood import Likelihood
from amulet_gguf.errors import SettingError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.method.arrays import Float64Array, Tokens
from amulet_gguf.method.sampling import log_sum
from amulet_gguf.prompts.messages import conversation, with_preference
from amulet_gguf.prompts.planning import Planner

_N_PROMPTS: Final = 3  # prompts kept in the cache: answers come grouped by question and preference
_N_CTX: Final = 2048
_LABELS: Final = ("A", "B")
_QUESTION: Final = """\
Compare two answers to a question.

Question:
{question}

Instruction for the style of the answer:
{preference}

Answer A:
{first}

Answer B:
{second}

Which answer follows the instruction better and still answers the question? Reply with A or B only."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two answers, shown to it in both orders.

    Attributes:
        first_shown: P(label of the answer judged) among the two labels, that answer being A.
        second_shown: the same, that answer being B.
        mass: probability of the two labels together, the smaller of the orders: a judge that does not
            understand its task puts it elsewhere.
    """

    first_shown: float
    second_shown: float
    mass: float

    @property
    def agrees(self) -> bool:
        """Both orders name the same winner."""
        return (self.first_shown > 0.5) == (self.second_shown > 0.5)

    @property
    def score(self) -> float:
        """1 for a win, 0 for a loss, 0.5 for a tie: the orders disagree."""
        return float(self.first_shown > 0.5) if self.agrees else 0.5


class Scorer:
    """One model, loaded to score with."""

    def __init__(self, loading: Loading, progress: Callable[[float], None] | None = None) -> None:
        """Load the model.

        Raises:
            As `amulet_gguf.amulet.Amulet.load`.
        """
        self._model = load_model(loading, progress=progress)
        try:
            n_ctx = loading.n_ctx or min(_N_CTX, self._model.n_ctx_train or _N_CTX)
            self._planner = Planner(self._model)
            self._likelihood = Likelihood(
                self._model, n_ctx=n_ctx, n_prompts=_N_PROMPTS, n_threads=loading.n_threads
            )
        except BaseException:
            self._model.close()
            raise
        self._labels = [self._label(label) for label in _LABELS]

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._likelihood.__exit__()
        self._model.close()

    def log_likelihood(self, question: str, preference: str | None, answer: str) -> Float64Array:
        """Return log P of each token of an answer, (n,) in nats, as the reply to a prompt.

        The prompt is the question with the preference at its end, in this model's own template.

        Raises:
            PromptTooLongError: prompt and answer do not fit into the context.
        """
        tokens = self._model.tokenize(answer, special=False)
        return self._likelihood.log_likelihood(self._encode(question, preference), tokens)

    def compare(self, question: str, preference: str, answer: str, other: str) -> Verdict:
        """Judge an answer against another, in both orders.

        Raises:
            PromptTooLongError: the two answers do not fit into the context.
        """
        shares, masses = [], []
        for first, second in ((answer, other), (other, answer)):
            text = _QUESTION.format(question=question, preference=preference, first=first, second=second)
            logits = self._likelihood.logits(self._encode(text, None))
            a, b = (float(logits[label] - log_sum(logits)) for label in self._labels)
            shares.append(1.0 / (1.0 + math.exp(b - a)))
            masses.append(math.exp(a) + math.exp(b))
        return Verdict(shares[0], 1.0 - shares[1], min(masses))

    def _label(self, label: str) -> int:
        tokens = self._model.tokenize(label, special=False)
        if len(tokens) != 1:
            raise SettingError(f"this model cannot judge: it spells {label!r} with {len(tokens)} tokens")
        return int(tokens[0])

    def _encode(self, question: str, preference: str | None) -> Tokens:
        messages = with_preference(conversation(question, None, None), preference, "turn")
        return self._planner.template.encode(messages).tokens
