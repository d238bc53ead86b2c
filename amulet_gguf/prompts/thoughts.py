"""How models mark what they think before they answer, and where the marks stand in what they write."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

from amulet_gguf.engine.answer import Kind
from amulet_gguf.engine.request import State
from amulet_gguf.method.vocabulary import Vocabulary


@dataclass(frozen=True)
class Marks:
    """How a family of models marks its thoughts.

    Attributes:
        opens: what a thought begins with, one of these.
        closes: what it ends with.
        answers: what may stand between it and the answer, white space aside.
        ending: what to write where a thought is to end, and the answer to follow at once.
        skipping: the same where none has begun.
    """

    opens: tuple[str, ...]
    closes: str
    answers: tuple[str, ...]
    ending: str
    skipping: str

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.opens, self.closes, *self.answers)


def _tags(opens: str, closes: str) -> Marks:
    return Marks((opens,), closes, (), f"\n{closes}\n\n", f"{opens}\n\n{closes}\n\n")


#: Of the families that have any; of several in a template, the first counts.
FAMILIES: Final = (
    Marks(  # gpt-oss
        (
            "<|channel|>analysis<|message|>",
            "<|channel|>commentary<|message|>",
            "<|start|>assistant<|channel|>analysis<|message|>",
            "<|start|>assistant<|channel|>commentary<|message|>",
        ),
        "<|end|>",
        ("<|start|>assistant<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
    Marks(
        ("<|channel>thought",), "<channel|>", (), "<channel|>", "<|channel>thought\n<channel|>"
    ),  # Gemma
    _tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    _tags("[THINK]", "[/THINK]"),  # Mistral
    _tags("<seed:think>", "</seed:think>"),  # ByteDance Seed
    _tags("◁think▷", "◁/think▷"),  # Kimi VL
    _tags("<mm:think>", "</mm:think>"),  # MiniMax M3
    _tags("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
    _tags("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    _tags("<think>", "</think>"),  # Qwen, DeepSeek, GLM, SmolLM, Nemotron, MiniMax, Granite, LFM, …
)
#: Tokens that templates look for in what the assistant said before, to leave its thoughts out. Those of
#: gpt-oss end messages, too: they stay text.
IN_HISTORIES: Final = frozenset({
    "<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>", "◁think▷", "◁/think▷",
    "<|START_THINKING|>", "<|END_THINKING|>", "<|channel>", "<channel|>", "<mm:think>", "</mm:think>",
    "<think:opensource>", "</think:opensource>", "<|inner_prefix|>", "<|inner_suffix|>",
})  # fmt: skip


#: Those of them that begin one.
OPENING: Final = frozenset({"<|channel>", *(mark for each in FAMILIES for mark in each.opens)})
_MAX_GAP: Final = 64  # characters of white space, after which no mark is waited for


def find_marks(template: str, special: Iterable[str]) -> Marks | None:
    """Return how a model marks its thoughts, by its chat template and its special tokens; None: not."""
    names = set(special)
    for marks in FAMILIES:
        # Only an end that ends nothing else says so alone.
        is_named = any(each in template for each in marks.opens)
        is_named |= marks.closes in IN_HISTORIES and marks.closes in template
        if is_named or names.issuperset((*marks.opens, marks.closes)):
            return marks
    return None


def switches(think: bool | None, effort: str | None) -> dict[str, Any]:
    """Return what templates call the wish to think, and how much."""
    found: dict[str, Any] = {}
    if think is not None:
        found |= {"enable_thinking": think, "thinking": think}
    if effort is not None:
        found["reasoning_effort"] = effort
    return found


def follows(marks: Marks, prompt: str) -> State:
    """Return what follows a rendered prompt: its end may open a thought, or close an empty one."""
    prompt = prompt.rstrip()
    if prompt.endswith(marks.opens):
        return "thought"
    return "answer" if prompt.endswith((marks.closes, *marks.answers)) else "open"


class Thoughts:
    """Tells thoughts from the answer in what a model writes.

    Attributes:
        state: what the next text belongs to; "open" where a thought or the answer may begin.
        has_thought: there was one, or a mark that says that there is none.
    """

    def __init__(self, marks: Marks, state: State) -> None:
        self._marks = marks
        self.state = state
        self._held = ""  # it may be the beginning of a mark
        self.has_thought = state == "thought"

    @property
    def holds(self) -> bool:
        """Whether text is held back that is no white space."""
        return bool(self._held.strip())

    def settle(self) -> None:
        """Let nothing but the answer follow."""
        self._held, self.state = "", "answer"

    def may_open(self, text: str) -> bool:
        """Tell whether a mark would begin or go on with this text."""
        marks = (*self._marks.opens, *self._marks.answers)
        told = (self._held + text).lstrip()
        return bool(told) and any(mark.startswith(told) or told.startswith(mark) for mark in marks)

    def push(self, text: str, *, final: bool = False) -> list[tuple[Kind, str]]:
        """Take text that was written; return what is now certain, without the marks.

        Args:
            final: nothing follows.
        """
        self._held += text
        found: list[tuple[Kind, str]] = []
        while self._held:
            if self.state == "open" and not self._open(final):
                break
            if self.state == "thought":
                before, closes, after = self._held.partition(self._marks.closes)
                if not closes:
                    keep = 0 if final else _beginning(before, self._marks.closes)
                    before, after = before[: len(before) - keep], before[len(before) - keep :]
                found.append(("thought", before))
                self._held = after
                if not closes:
                    break
                self.state = "open"
            elif self.state == "answer":
                found.append(("answer", self._held))
                self._held = ""
        return [(kind, text) for kind, text in found if text]

    def _open(self, final: bool) -> bool:
        """Find out what begins; return whether that is certain."""
        told = self._held.lstrip()
        for mark in (*self._marks.answers, *self._marks.opens):
            if told.startswith(mark):
                self._held = told[len(mark) :]
                self.state = "answer" if mark in self._marks.answers else "thought"
                self.has_thought = True
                return True
        marks = (*self._marks.answers, *self._marks.opens)
        may_follow = any(mark.startswith(told) for mark in marks) and len(self._held) <= _MAX_GAP
        if not final and may_follow:
            return False
        if self.has_thought:
            self._held = told
        self.state = "answer"
        return True


def _beginning(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that begins a mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


class Thinking:
    """Follows the tokens of one answer (see `amulet_gguf.engine.request.Thoughts`)."""

    def __init__(self, marks: Marks, state: State, vocabulary: Vocabulary) -> None:
        self._new = partial(Thinking, marks, state, vocabulary)
        self._marks = marks
        self._vocabulary = vocabulary
        self._thoughts = Thoughts(marks, state)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def anew(self) -> Thinking:
        """Return one for the same prompt, of which nothing was written."""
        return self._new()

    @property
    def state(self) -> State:
        """What the next token belongs to."""
        return self._thoughts.state

    @property
    def has_thought(self) -> bool:
        """Whether there was a thought, or a mark that says that there is none."""
        return self._thoughts.has_thought

    @property
    def holds(self) -> bool:
        """Whether what was written last may be the beginning of a mark."""
        return self._thoughts.holds

    @cached_property
    def opening(self) -> Sequence[Sequence[int]]:
        """The tokens of the marks that may come before the answer."""
        marks = (*self._marks.opens, *self._marks.answers)
        return [self._vocabulary.tokenize(mark, special=True).tolist() for mark in marks]

    def may_open(self, token: int) -> bool:
        """Tell whether a token may begin a thought, or go on with its mark."""
        return self._thoughts.may_open(self._spelled(token).decode(errors="ignore"))

    def push(self, token: int) -> list[tuple[Kind, bytes]]:
        """Take a token that was written; return what is now certain, in UTF-8."""
        found = self._said(self._thoughts.push(self._decoder.decode(self._spelled(token))))
        if self.state == "answer":  # the beginning of a character, perhaps, that others end
            found.append(("answer", self._decoder.getstate()[0]))
        return found

    def end(self) -> list[tuple[Kind, bytes]]:
        """Return what was held back: nothing follows."""
        return self._said(self._thoughts.push(self._decoder.decode(b"", True), final=True))

    def settle(self) -> None:
        """Let nothing but the answer follow."""
        self._thoughts.settle()

    @staticmethod
    def _said(found: list[tuple[Kind, str]]) -> list[tuple[Kind, bytes]]:
        return [(kind, text.encode()) for kind, text in found]

    def _spelled(self, token: int) -> bytes:
        """Control tokens have no text, but are parts of marks."""
        data = self._vocabulary.token_bytes(token)
        name = "" if data else self._vocabulary.token_text(token)
        is_of_marks = any(name in mark for mark in self._marks.all) if name else False
        return name.encode() if is_of_marks else data
