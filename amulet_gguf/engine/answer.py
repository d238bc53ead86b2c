"""What comes of a generation: the pieces of an answer, its counts and times, and the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from amulet_gguf.method.explanation import Explanation

Kind: TypeAlias = Literal["thought", "answer", "call"]
FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class CallPart:
    """What a step added to a call of a function.

    Attributes:
        number: of the call in the answer, from 0.
        name: of the function, in the call's first part.
        arguments: JSON text that follows what came before.
    """

    number: int
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Call:
    """A call of a function: its name, and its arguments as JSON, whole unless the answer was cut."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer.

    Attributes:
        text: text that is now certain; may be empty, for characters and stop strings under way.
        token: the token's id; None where the answer ended without one.
        changed: realignment put another token first here than ordinary prompting does; never at strength
            0, where that is not computed.
        finish_reason: set on the last piece: "stop" (end of text, or a stop string), "length"
            (max_tokens or the context is used up), "cancelled".
        explanation: what realignment did here, where the request asked for it; not in thoughts, which
            are written as ordinary prompting writes them.
        kind: what the text belongs to; the text of a call is in `call` alone.
        call: what was added to a call of a function.
        stopped_by: the stop string that ended the answer; on the last piece, None where none did.
    """

    text: str
    token: int | None = None
    changed: bool = False
    finish_reason: FinishReason | None = None
    explanation: Explanation | None = None
    kind: Kind = "answer"
    call: CallPart | None = None
    stopped_by: str | None = None


def joined(pieces: Iterable[Piece], kind: Kind = "answer") -> str:
    """Return the text of an answer, or of its thoughts."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@dataclass(frozen=True)
class Usage:
    """Counts of tokens.

    Attributes:
        prompt_tokens: of the longest branch.
        cached_tokens: of those, what was in the cache and not read again.
        prefill_tokens: read before the answer, over all branches, a shared prefix counted once.
        completion_tokens: of the answer, thoughts included.
        thought_tokens: those before it, with the marks of thoughts.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_tokens: int
    completion_tokens: int
    thought_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Wall-clock times of one generation, in seconds.

    Attributes:
        queue: from the request to the first step made for it.
        prefill: from there to the first token.
        decode: from the first token to the end.
        tokens_per_second: of decode, the first token left out; 0 where there is only one.
    """

    queue: float
    prefill: float
    decode: float
    tokens_per_second: float


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: all of it, without thoughts.
        finish_reason: see `Piece`.
        usage, timings: what it took.
        pieces: the steps it was made of.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    pieces: Sequence[Piece]

    @property
    def thought(self) -> str:
        """What the model thought before it answered."""
        return joined(self.pieces, "thought").strip()

    @property
    def calls(self) -> list[Call]:
        """The functions that the model calls, in their order."""
        return calls_in(self.pieces)


def calls_in(pieces: Iterable[Piece]) -> list[Call]:
    """Return the calls that pieces make up."""
    found: list[Call] = []
    for piece in pieces:
        if piece.call is not None and piece.call.name is not None:
            found.append(Call(piece.call.name, piece.call.arguments))
        elif piece.call is not None:
            found[-1] = Call(found[-1].name, found[-1].arguments + piece.call.arguments)
    return found
