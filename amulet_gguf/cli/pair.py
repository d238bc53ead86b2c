"""Two answers to choose from, and what a taste learns from the choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from amulet_gguf.taste.taste import Candidate, Choice

if TYPE_CHECKING:
    from rich.console import Console

    from amulet_gguf.amulet import Amulet
    from amulet_gguf.engine.answer import Piece
    from amulet_gguf.settings import Settings
    from amulet_gguf.taste.taste import Taste


_WORTH_TELLING: Final = 0.15  # sureness
_N_TOLD: Final = 3


@dataclass(frozen=True)
class Pair:
    """Answers A and B to messages, as they were shown.

    Attributes:
        system: the prompt that they were written with, if any.
        sizes: tokens of the conversation with each.
        taste: that learns from the choice.
        model: name of the file of the model that wrote them.
    """

    messages: Sequence[Mapping[str, str]]
    system: str | None
    candidates: Mapping[str, Candidate]
    sizes: Mapping[str, int]
    taste: Taste
    model: str

    @property
    def is_equal(self) -> bool:
        """There is nothing to choose."""
        first, second = self.candidates.values()
        return first.text.strip() == second.text.strip()

    def choose(self, better: str) -> None:
        """Learn from the choice of "A" or "B".

        Raises:
            TasteError, ConfigError: see `Taste.add`.
        """
        (worse,) = self.candidates.keys() - {better}
        messages = with_system(self.system, self.messages)
        self.taste.add(Choice(messages, self.candidates[better], self.candidates[worse], self.model))


def with_system(system: str | None, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return messages with a system prompt in front, if there is one."""
    return [*([{"role": "system", "content": system}] if system else []), *messages]


def write_pair(
    console: Console,
    amulet: Amulet,
    taste: Taste,
    messages: Sequence[Mapping[str, str]],
    settings: Settings,
) -> Pair:
    """Write the two answers that teach most, side by side.

    They are read for their features at once, while whoever chooses reads them too.
    """
    from amulet_gguf.cli.columns import Columns

    prefer = dict(zip("AB", taste.pair(), strict=True))
    methods = {name: settings.replace(prefer=text or None) for name, text in prefer.items()}
    with Columns(console, {name: name for name in prefer}, marks=False) as columns:

        def add(name: str, piece: Piece) -> None:
            if piece.finish_reason == "length":
                piece = dataclasses.replace(piece, text=f"{piece.text} […]")
            columns.add(name, piece)

        answers = amulet.compare(None, methods, add, messages=messages)
    texts = [answer.text for answer in answers.values()]
    features = features_of(amulet, taste, with_system(settings.system, messages), texts)
    candidates = {
        name: Candidate(text, each, prefer[name])
        for name, text, each in zip(prefer, texts, features, strict=True)
    }
    sizes = {
        name: answer.usage.prompt_tokens + answer.usage.completion_tokens
        for name, answer in answers.items()
    }
    return Pair(messages, settings.system, candidates, sizes, taste, amulet.model.path.name)


def features_of(
    amulet: Amulet, taste: Taste, messages: Sequence[Mapping[str, str]], texts: Sequence[str]
) -> list[dict[str, float]]:
    """Return the features of answers, by attribute."""
    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.engine.likelihood import result
    from amulet_gguf.taste.features import log_ratios

    reading = log_ratios(amulet, messages, texts, taste.attributes)
    with LateBar("Reading the answers") as bar:
        found = result(reading, lambda told: bar.update(*told))
    return [dict(zip(taste.attributes, row, strict=True)) for row in found.tolist()]


def told(taste: Taste) -> str:
    """Return what is known in a line: "7 choices: you seem to like formal (62 %)"."""
    n = len(taste.choices)
    likely = [each for each in taste.weights() if each.sureness >= _WORTH_TELLING][:_N_TOLD]
    parts = [f"{'' if w.mean > 0 else 'not '}{w.name} ({w.sureness:.0%})" for w in likely]
    found = f"you seem to like {', '.join(parts)}" if parts and n else "nothing is known yet"
    return f"{n} choice{'' if n == 1 else 's'}: {found}"
