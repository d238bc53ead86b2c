"""An answer as it is written: its next token is chosen from the branches' logits, and becomes text."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from amulet_gguf.engine.answer import CallPart, FinishReason, Kind, Piece
from amulet_gguf.engine.request import Calls, Grammar, Request, State
from amulet_gguf.engine.text import TextAssembler
from amulet_gguf.method.arrays import Float32Array
from amulet_gguf.method.explanation import Alternative, Explanation, explain
from amulet_gguf.method.facts import Facts
from amulet_gguf.method.mixture import Mixture
from amulet_gguf.method.realign import argmax
from amulet_gguf.method.sampling import FORBIDDEN
from amulet_gguf.method.vocabulary import Detokenizer


class Writing:
    """What is written of an answer.

    Attributes:
        request: what was asked for.
        pieces: what was produced and not yet taken.
        finish_reason: None while it is written or if that failed.
        error: why it failed, or None.
        thought_limit: tokens of a thought at most, or None.
        first_token_at, finished_at: seconds of `time.perf_counter`.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pieces: deque[Piece] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.first_token_at: float | None = None
        self.finished_at: float | None = None
        self._written: list[int] = []
        self._text = TextAssembler(request.stop)
        self._facts = Facts()
        rule = request.thoughts
        self._thoughts = None if rule is None else rule.follows.anew()
        self._of_thoughts = None if rule is None or rule.mixture is None else rule.mixture.anew()
        self.thought_limit = None if rule is None else rule.max_tokens
        self._n_thought = 0  # tokens, marks included
        self._held: list[int] = []  # the last tokens, while they may be the beginning of a mark
        self._begin_grammar()
        calls = request.calls
        self._calls = None if calls is None else calls.follows.anew()
        self._of_calls = None if calls is None or calls.mixture is None else calls.mixture.anew()

    @property
    def n_tokens(self) -> int:
        """Tokens written."""
        return len(self._written)

    @property
    def is_finished(self) -> bool:
        return self.finished_at is not None

    @property
    def _state(self) -> State:
        return "answer" if self._thoughts is None else self._thoughts.state

    @property
    def _is_calling(self) -> bool:
        return self._calls is not None and self._calls.grammar is not None

    @property
    def _grammar(self) -> Grammar | None:
        """What the next token obeys, if it is not of a thought."""
        calls = self._calls
        if calls is not None and calls.grammar is not None:
            return calls.grammar
        is_over = self._is_off_grammar or (calls is not None and calls.has_called)
        return None if is_over else self._grammar_of_text

    def now(self, mixture: Mixture) -> Mixture:
        """Return the mixture of the next token: this one, if it is not of a thought or of a call."""
        if self._state == "thought":
            return mixture if self._of_thoughts is None else self._of_thoughts
        return self._of_calls if self._is_calling and self._of_calls is not None else mixture

    def choose(
        self, mixture: Mixture, logits: Float32Array, row: Float32Array, detokenizer: Detokenizer
    ) -> int:
        """Choose a token and write it; return it.

        Args:
            mixture: of this token.
            logits: (N, V) of the branches that it needs.
            row: (V,) work space.
        """
        forced = self._forced()
        if forced:
            self._write(forced[0], False, self._certain(forced[0], detokenizer), detokenizer)
            return forced[0]
        self.request.sampler.bias(logits)
        self._forbid(logits)
        prompted = mixture.combine(logits, row, lambda token: self._is_plain(token, detokenizer))
        changed = int(argmax(row)) != prompted  # before penalties and chance have their say
        is_explained = self._state != "thought" and not self._is_calling
        n_alternatives = self.request.n_alternatives if is_explained else 0
        combined = row.copy() if n_alternatives else row  # sampling applies penalties to the row
        token = self.request.sampler.sample(row)
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        stops = self.request.stop_tokens if self._state == "answer" else ()
        if detokenizer.ends_generation(token) or (token in stops and not self._is_calling):
            if self._state == "thought":
                self.thought_limit = 0  # it forgot the answer
            else:
                self.finish("stop")
            return token
        explanation, spell = None, detokenizer.token_bytes
        if n_alternatives:
            explanation = explain(
                logits, mixture.judge, combined, token, spell, n_alternatives, mixture.strength
            )
        self._write(token, changed, explanation, detokenizer)
        return token

    def write_forced(self, detokenizer: Detokenizer) -> None:
        """Write the tokens that nothing else can follow: there is nothing to choose."""
        for token in () if self.is_finished else self._forced():
            if not self.is_finished:
                self._write(token, False, self._certain(token, detokenizer), detokenizer)

    def _forced(self) -> Sequence[int]:
        """Return the tokens that must come next, by the grammar of the answer or of a call."""
        if self._state != "answer":
            return ()
        if self._must_call and self._calls is not None:
            return self._calls.opening[len(self._held) :]
        # Where a call may begin, the grammar of text leaves another way.
        is_free = self._calls is not None and not self._is_calling
        return () if self._grammar is None or is_free else self._grammar.forced()

    def _certain(self, token: int, detokenizer: Detokenizer) -> Explanation | None:
        if not self.request.n_alternatives:
            return None
        text = detokenizer.token_bytes(token).decode("utf-8", "replace")
        return Explanation(1.0, 0.0, 1.0, 1.0, (Alternative(token, text, 1.0, 1.0),))

    def _forbid(self, logits: Float32Array) -> None:
        """Rule out what cannot come next in (N, V) logits: ends that are too early, and what the
        grammar of the answer says."""
        request = self.request
        is_early = self._n_answer < request.min_tokens and self._state != "thought"
        if is_early and request.end_tokens is not None:
            logits[:, request.end_tokens] = FORBIDDEN
        if self._state == "thought":
            return
        grammar, must_call = self._grammar, self._must_call
        if grammar is None and not must_call and not self._is_off_grammar:
            return
        going_on = self._going_on()
        if must_call or (self._is_off_grammar and going_on):
            kept = logits[:, going_on]
            logits[:] = FORBIDDEN
            logits[:, going_on] = kept
        elif grammar is not None:
            grammar.forbid(logits, going_on)

    @property
    def _must_call(self) -> bool:
        return self._calls is not None and not self._is_calling and self._calls.is_needed

    def _going_on(self) -> list[int]:
        """Return the tokens that begin marks which may come here, or go on with the one that is held."""
        marks = [*self._thoughts.opening] if self._thoughts is not None and self._state == "open" else []
        if self._calls is not None and not self._is_calling:
            marks.append(self._calls.opening)
        n = len(self._held)
        return [mark[n] for mark in marks if len(mark) > n and [*mark[:n]] == self._held]

    def _is_plain(self, token: int, detokenizer: Detokenizer) -> bool:
        """Tell whether a token, ordinary prompting's best, is to be written as that would."""
        if self._thoughts is not None and self._state == "open":
            return self._thoughts.may_open(token)
        return self.request.protects_facts and self._facts.include(detokenizer.token_bytes(token))

    def _write(
        self, token: int, changed: bool, explanation: Explanation | None, detokenizer: Detokenizer
    ) -> None:
        self._written.append(token)
        data, thoughts = detokenizer.token_bytes(token), self._thoughts
        was_thinking, grammar = self._state == "thought", self._grammar_of_text
        is_whole = False
        if grammar is not None and grammar is self._grammar and not was_thinking:
            # What is written may still turn out to open a thought or a call.
            self._is_off_grammar = not grammar.accepts(token)
            is_whole = not self._is_off_grammar and grammar.push(token, data)
        if thoughts is not None and thoughts.state != "answer":
            is_of_mark = thoughts.may_open(token) or thoughts.has_thought
            found = thoughts.push(token)
            data = b"".join(said for kind, said in found if kind == "answer")
            self.pieces.extend(
                Piece(said.decode(), kind="thought") for k, said in found if k == "thought"
            )
            if self._state != "answer" or not data:
                self._n_thought += 1
            if is_of_mark and not data:
                changed, explanation = False, None
        if was_thinking and data and grammar is not None and self._state == "answer":
            is_whole = grammar.push(token, data)  # one token with the end of the thought
        if self._calls is not None and self._state == "answer":
            data = self._take_calls(self._calls, token, data)
            is_whole |= self._calls.is_over
            if self._is_calling or not data:
                changed, explanation = False, None
        is_held = thoughts is not None and thoughts.holds
        is_held |= self._calls is not None and self._calls.holds
        self._held = [*self._held, token] if is_held else []
        if self._state == "thought" or (self._is_off_grammar and not is_held):
            self._begin_grammar()  # what was written was no text
        self._facts.push(data)
        kind: Kind = "thought" if self._state == "thought" else "call" if self._is_calling else "answer"
        piece = Piece(self._text.push(data), token, changed, None, explanation, kind)
        if self.is_finished:  # cancelled in the middle of this, by a signal's handler or a destructor
            return
        if self._text.stopped or is_whole:
            self.finish("stop", piece)
        elif self._n_answer >= self.request.max_tokens:
            self.finish("length", piece)
        else:
            self.pieces.append(piece)

    def _begin_grammar(self) -> None:
        grammar = self.request.grammar
        self._grammar_of_text = None if grammar is None else grammar.anew()
        self._is_off_grammar = False

    def _take_calls(self, calls: Calls, token: int, data: bytes) -> bytes:
        """Return what of a token is text; calls become pieces."""
        found = calls.push(token, data)
        self._add_calls(found)
        return "".join(each for each in found if isinstance(each, str)).encode()

    def _add_calls(self, found: Sequence[str | CallPart]) -> None:
        for part in found:
            if not isinstance(part, str):
                self.pieces.append(Piece("", kind="call", call=part))

    @property
    def _n_answer(self) -> int:
        """Tokens written of the answer."""
        has_thought = self._thoughts is not None and self._thoughts.has_thought
        return self.n_tokens - self._n_thought if has_thought else self.n_tokens

    def cut_thought(self, detokenizer: Detokenizer) -> bool:
        """End a thought that is too long; return whether it was."""
        rule, thoughts, limit = self.request.thoughts, self._thoughts, self.thought_limit
        if rule is None or thoughts is None or limit is None:
            return False
        if thoughts.state != "thought" or self._n_thought < limit:
            return False
        for token in rule.ending:
            self._write(token, False, None, detokenizer)
        thoughts.settle()
        return True

    def finish(self, reason: FinishReason, last: Piece | None = None) -> None:
        """End with a last piece, which gets all text that was held back."""
        if not self.is_finished:
            last = last or Piece("")
            text = last.text
            if self._thoughts is not None and self._thoughts.state != "answer":
                for kind, said in self._thoughts.end():
                    if kind == "thought":
                        self.pieces.append(Piece(said.decode(), kind=kind))
                    else:
                        text += self._text.push(said)
            if self._calls is not None:
                held = self._calls.end()
                self._add_calls(held)
                text += self._text.push("".join(e for e in held if isinstance(e, str)).encode())
            text += self._text.push(b"", final=True)
            stopped_by = self._text.stopped_by
            self.pieces.append(replace(last, text=text, finish_reason=reason, stopped_by=stopped_by))
            self.finish_reason = reason
            self.finished_at = time.perf_counter()
            is_whole = 0 < self.n_tokens == self._n_answer and not self._text.stopped
            if self.request.on_end is not None and is_whole:
                self.request.on_end(self._written)

    def fail(self, error: BaseException) -> None:
        """End with an error, which is raised after the pieces produced so far."""
        if not self.is_finished:
            self.error = error
            self.finished_at = time.perf_counter()
