"""What realignment did to an answer, token by token: numbers, and a page."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from amulet_gguf.engine.answer import Piece, joined

#: Points shown with their alternatives.
N_STRONGEST: Final = 5
_MIN_DIVERGENCE: Final = 0.01  # nats; below, nothing is worth showing


@dataclass(frozen=True)
class Summary:
    """An answer in numbers.

    Attributes:
        tokens: how many were written.
        changed: those at which realignment preferred another token than ordinary prompting.
        mean_divergence: mean KL(realigned || ordinary prompting), in nats per token.
    """

    tokens: int
    changed: int
    mean_divergence: float


def explained(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces that stand for a token and say what happened there."""
    return [piece for piece in pieces if piece.explanation is not None]


def summarize(pieces: Sequence[Piece]) -> Summary:
    """Return an answer in numbers."""
    found = explained(pieces)
    total = sum(piece.explanation.divergence for piece in found if piece.explanation is not None)
    changed = sum(piece.changed for piece in found)
    return Summary(len(found), changed, total / len(found) if found else 0.0)


def strongest(pieces: Sequence[Piece]) -> list[int]:
    """Return the indices of the tokens that were moved most, in the order of the text."""
    moved = [
        (piece.explanation.divergence, i)
        for i, piece in enumerate(pieces)
        if piece.explanation is not None and piece.explanation.divergence >= _MIN_DIVERGENCE
    ]
    return sorted(i for _, i in sorted(moved, reverse=True)[:N_STRONGEST])


def before(pieces: Sequence[Piece], index: int, n: int = 40) -> str:
    """Return the last n characters before a token, on one line."""
    return " ".join(joined(pieces[:index]).split())[-n:]


def as_record(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return all of it as plain data."""
    return {
        "summary": dataclasses.asdict(summarize(pieces)),
        "tokens": [
            {
                "text": piece.text,
                "token": piece.token,
                "changed": piece.changed,
                **dataclasses.asdict(piece.explanation),
            }
            for piece in pieces
            if piece.explanation is not None
        ],
    }


def page(prompt: str, about: str, model: str, pieces: Sequence[Piece]) -> str:
    """Return a page of HTML that needs nothing else.

    Args:
        prompt: what was asked.
        about: preferences and strength, in words.
    """
    import jinja2

    source = importlib.resources.files("amulet_gguf.cli").joinpath("explained.html.jinja")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(source.read_text("utf-8")).render(
        prompt=prompt,
        about=about,
        model=model,
        summary=summarize(pieces),
        pieces=explained(pieces),
        strongest=[
            (before(pieces, i), pieces[i].text, pieces[i].explanation) for i in strongest(pieces)
        ],
    )
    return html.encode("utf-8", "replace").decode()
