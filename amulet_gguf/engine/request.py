"""What is asked of the engine: one generation, and how it is to be written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from amulet_gguf.engine.answer import CallPart, Kind
from amulet_gguf.engine.drafts import Drafts
from amulet_gguf.method.arrays import Float32Array, Tokens
from amulet_gguf.method.mixture import Mixture
from amulet_gguf.method.sampling import Sampler

#: What the next token of an answer belongs to; "open" where a thought may begin.
State: TypeAlias = Literal["open", "thought", "answer"]


class Thoughts(Protocol):
    """What the engine needs of `amulet_gguf.prompts.thoughts.Thinking`, which follows one answer."""

    @property
    def state(self) -> State: ...
    @property
    def has_thought(self) -> bool: ...
    @property
    def holds(self) -> bool: ...
    @property
    def opening(self) -> Sequence[Sequence[int]]: ...
    def anew(self) -> Thoughts: ...
    def may_open(self, token: int) -> bool: ...
    def push(self, token: int) -> Sequence[tuple[Kind, bytes]]: ...
    def end(self) -> Sequence[tuple[Kind, bytes]]: ...
    def settle(self) -> None: ...


class Grammar(Protocol):
    """What the engine needs of `amulet_gguf.prompts.grammars.Matcher`, which follows one answer.

    - forced: tokens that alone can come next.
    - forbid: rules out of (N, V) logits, in place, what cannot come next; `also` can.
    - accepts: tells whether a token can come next.
    - push: takes a token, of which `data` belongs to the answer; returns whether nothing can follow.
    """

    def anew(self) -> Grammar: ...
    def forced(self) -> Sequence[int]: ...
    def accepts(self, token: int) -> bool: ...
    def forbid(self, logits: Float32Array, also: Sequence[int]) -> None: ...
    def push(self, token: int, data: bytes) -> bool: ...


class Calls(Protocol):
    """What the engine needs of `amulet_gguf.prompts.calling.Calling`, which follows one answer.

    - grammar: of the call under way; None: there is none.
    - has_called, is_over: a call was begun; nothing may follow.
    - holds: what was written last may be the beginning of a call.
    - is_needed: a call must come next.
    - opening: the tokens that open a call.
    - push: takes a token, of which `data` belongs to the answer; returns texts and parts of calls.
    - end: returns what was held back.
    """

    @property
    def grammar(self) -> Grammar | None: ...
    @property
    def has_called(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def holds(self) -> bool: ...
    @property
    def is_needed(self) -> bool: ...
    @property
    def opening(self) -> Sequence[int]: ...
    def anew(self) -> Calls: ...
    def push(self, token: int, data: bytes) -> Sequence[str | CallPart]: ...
    def end(self) -> Sequence[str | CallPart]: ...


@dataclass(frozen=True)
class CallRule:
    """How calls of functions are written.

    Attributes:
        follows: tells them from text.
        mixture: of their tokens; None: that of the answer.
    """

    follows: Calls
    mixture: Mixture | None


@dataclass(frozen=True)
class ThoughtRule:
    """How thoughts are written.

    Attributes:
        follows: tells thoughts from the answer.
        mixture: of their tokens; None: that of the answer.
        max_tokens: of a thought, or None.
        ending: tokens that end one, written when it is too long.
    """

    follows: Thoughts
    mixture: Mixture | None
    max_tokens: int | None
    ending: Sequence[int]

    def limit(self, room: int, max_tokens: int) -> int:
        """Return how long a thought may be, so that an answer has room, half of all at most."""
        room -= len(self.ending)
        most = max(0, room - min(max_tokens, room // 2))
        return most if self.max_tokens is None else min(most, self.max_tokens)


@dataclass(frozen=True)
class Request:
    """One generation to run.

    Attributes:
        branches: prompt of each branch, (n,) int32 with n >= 1.
        mixture: of the branches.
        sampler: chooses the tokens; belongs to this generation alone.
        max_tokens: length of the answer at most, >= 1, thoughts not counted.
        min_tokens: of the answer, before which `end_tokens` are not chosen.
        end_tokens: (n,) int32, that end it.
        stop: stop strings, none of them empty.
        stop_tokens: that end the answer, too: control tokens, which have no text.
        reuse: begin from what is cached of the prompts, and leave what this one read and wrote cached.
            The answer can differ in near ties: sums are in another order.
        n_alternatives: explain each token with so many of each distribution's best; 0: do not.
        on_end: called with the tokens of the answer at its end, unless a stop string cut it short.
        drafts: guesses of its tokens, to be verified several in a step.
        protects_facts: names, numbers and the like are written as ordinary prompting has them.
        thoughts: how to write them, of a model that may think.
        grammar: that the answer obeys.
        calls: how to write them, where the model may call functions.
    """

    branches: Sequence[Tokens]
    mixture: Mixture
    sampler: Sampler
    max_tokens: int
    min_tokens: int = 0
    end_tokens: Tokens | None = None
    stop: Sequence[str] = ()
    stop_tokens: Collection[int] = ()
    reuse: bool = False
    n_alternatives: int = 0
    on_end: Callable[[Sequence[int]], None] | None = None
    drafts: Drafts | None = None
    protects_facts: bool = False
    thoughts: ThoughtRule | None = None
    grammar: Grammar | None = None
    calls: CallRule | None = None
