"""A conversation whose preferences may change at any time, at the cost of what is new.

Earlier turns carry no preference, so that the base branch of one turn is the beginning of every branch
of the next, whatever is preferred then. Where an answer did not need the base (strength 1), the next
turn reads it first, many tokens at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from datetime import date
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.answer import Piece, joined
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import PromptError, shown
from amulet_gguf.prompts.messages import THOUGHT, Message
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.template import Encoded
from amulet_gguf.settings import Options, Settings, as_settings
from amulet_gguf.stream import AnswerStream, JobOptions, OnPrefill, Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Of each distribution, for every token.
N_ALTERNATIVES = 5

AnyStream = TypeVar("AnyStream", bound=AnswerStream, covariant=True)


class Host(Protocol[AnyStream]):
    """What answers: an `Amulet`, whose caller makes the steps, or an `AmuletService`, which does."""

    def start(self, plan: Plan, settings: Settings, **options: Unpack[JobOptions]) -> AnyStream: ...
    def wait_ready(self, timeout: float | None = None) -> Amulet: ...


class Conversation(Generic[AnyStream]):
    """Messages between the user and the model, cached as they grow.

    One answer at a time: what changes the messages meanwhile wins, and the answer is not kept. With a
    service, all but `ask` wait for its model to be loaded.

    Attributes:
        messages: user and assistant in turn; the system prompt is in `settings`.
        settings: of the next answer; assign others at any time.
        pieces: of the last answer, with explanations.
    """

    def __init__(
        self,
        host: Host[AnyStream],
        settings: Settings | None = None,
        messages: Iterable[Message] = (),
    ) -> None:
        self._host = host
        self.settings = as_settings(settings)
        self._today: str | None = None  # that a template was told, if nobody named a date
        try:
            self.messages: list[dict[str, str]] = [dict(message) for message in messages]
        except (TypeError, ValueError):
            raise PromptError(f"expected a list of messages, got {shown(messages)}") from None
        self.pieces: list[Piece] = []

    @property
    def amulet(self) -> Amulet:
        """The model that answers, to be looked at."""
        return self._host.wait_ready()

    def ask(
        self,
        text: str,
        *,
        draft: str | None = None,
        on_prefill: OnPrefill | None = None,
        **options: Unpack[Options],
    ) -> AnyStream:
        """Answer a message of the user, piece by piece.

        When the answer ends, in whatever way, what was taken of it becomes part of the conversation, and
        so does what `adjust` changed.

        Args:
            draft, on_prefill: as in `Amulet.stream`.
            **options: fields of `Settings` that change, from now on.

        Raises:
            SettingError, PromptError: at once, with a service from the iterator. `PromptTooLongError`:
                see `drop_oldest`.
            EngineError: from the iterator.
        """
        return self._answer(self._with(text), draft, on_prefill, options)

    def restyle(self, *, on_prefill: OnPrefill | None = None, **options: Unpack[Options]) -> AnyStream:
        """Write the last answer again, with other settings; where it stays as it was, it comes sooner.

        The new answer takes the place of the old one when it ends, if there is any text.

        Raises:
            PromptError: there is no answer.
            Others: as `ask`.
        """
        *messages, answer = self.messages or [{}]
        if answer.get("role") != "assistant":
            raise PromptError("there is no answer to write again")
        return self._answer(messages, answer["content"], on_prefill, options)

    def _answer(
        self,
        messages: list[dict[str, str]],
        draft: str | None,
        on_prefill: OnPrefill | None,
        options: Options,
    ) -> AnyStream:
        if self.settings.date == self._today and not self.messages:
            self._today = date.today().isoformat()  # another conversation, on another day perhaps
            self.settings = self.settings.replace(date=self._today)
        self.settings = asked = self.settings.replace(**options)
        before = list(self.messages)

        def plan(planner: Planner, settings: Settings) -> Request:
            return _request(planner, messages, settings, draft)

        def add(stream: AnswerStream) -> None:
            adjusted = stream.adjusted
            if not self.settings.prefer:  # the weight is that of what is to be avoided
                adjusted = {"strength": adjusted["strength"]} if "strength" in adjusted else {}
            self.settings = self.settings.replace(**adjusted)
            # One without an answer is left out: the user can ask again.
            if stream.text and self.messages == before:
                said = {"role": "assistant", "content": stream.text}
                if thought := joined(stream.pieces, "thought"):
                    said[THOUGHT] = thought
                self.messages = [*messages, said]
                self.pieces = list(stream.pieces)

        return self._host.start(plan, asked, is_adjustable=True, on_prefill=on_prefill, on_end=add)

    def room(self, text: str, needed: int) -> tuple[int, int]:
        """Return how many tokens of answer a message would leave room for, which may be negative.

        And how many of the oldest turns are to be forgotten so that `needed` fit: 0 if they do, one more
        than there are if all would not be enough.
        """
        plain = self.settings.replace(prefer=(), avoid=None)
        turns = sum(message["role"] == "user" for message in self.messages)
        # What preferences take does not depend on the turns before, of which there may be thousands.
        extra = self._room(text, turns, plain) - self._room(text, turns, self.settings)
        room = self._room(text, 0, plain) - extra
        if room >= needed:
            return room, 0
        n = 1 + bisect_left(
            range(1, turns + 1), True, key=lambda n: self._room(text, n, plain) - extra >= needed
        )
        while n <= turns and self._room(text, n, self.settings) < needed:
            n += 1
        return room, n

    def _room(self, text: str, dropped: int, settings: Settings) -> int:
        messages = [*self._without(dropped), {"role": "user", "content": text}]
        request = _request(self.amulet.planner, messages, settings)
        return self.amulet.engine.n_ctx - max(map(len, request.branches))

    def undo(self) -> str | None:
        """Take back the last turn; return what the user said in it, or None if there is none."""
        while self.messages:
            message = self.messages.pop()
            self.pieces = []
            if message["role"] == "user":
                return message["content"]
        return None

    def drop_oldest(self, turns: int = 1) -> None:
        """Forget the oldest turns. The system prompt stays; the rest is read again."""
        self.messages[:] = self._without(turns)

    def _without(self, turns: int) -> list[dict[str, str]]:
        if turns == 0:
            return self.messages
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return self.messages[starts[turns] if turns < len(starts) else len(self.messages) :]

    def clear(self) -> None:
        """Forget all turns."""
        self.messages.clear()
        self.pieces = []

    def save_cache(self) -> tuple[Encoded, bytes] | None:
        """Return what is cached of the conversation, for `restore_cache`; None if nothing.

        That is all of it up to the end of an answer, if the base read so far: where the last answer did
        not need it (strength 1), up to the one before.
        """
        transcripts = self.amulet.planner.transcripts(self.settings)
        engine = self.amulet.engine
        found = None
        for end in self._ends():
            whole = transcripts.whole(self._base(end))
            saved = engine.save(whole.tokens)
            if saved is None:
                break
            tokens, data = saved
            found = Encoded(whole.text if len(tokens) == len(whole.tokens) else "", tokens), data
            if len(tokens) >= len(whole.tokens) - 1:  # the last one was not read if it met the limit
                break
        return found

    def restore_cache(self, cached: Encoded, data: bytes) -> None:
        """Put back what `save_cache` returned, for the same messages and model.

        Raises:
            EngineError: it does not fit this model or context.
        """
        self.amulet.engine.restore(cached.tokens, data)
        transcripts = self.amulet.planner.transcripts(self.settings)
        for end in self._ends():
            if transcripts.whole(self._base(end)).text == cached.text:
                transcripts.learn(self._base(end), cached)
                return

    def _ends(self) -> Iterator[int]:
        """Yield how many messages there are up to each answer, the last one first."""
        for end in range(len(self.messages), 0, -1):
            if self.messages[end - 1]["role"] == "assistant":
                yield end

    def _with(self, text: str) -> list[dict[str, str]]:
        return [*self.messages, {"role": "user", "content": text}]

    def _base(self, end: int) -> list[dict[str, str]]:
        """Return so many messages as the base branch has them; the last is an answer."""
        *before, last = self.messages[:end]
        return [*self.amulet.planner.base(None, before, self.settings), last]


def _request(
    planner: Planner, messages: list[dict[str, str]], settings: Settings, draft: str | None = None
) -> Request:
    return planner.request(
        None,
        messages,
        settings,
        reuse=True,
        is_adjustable=True,
        n_alternatives=N_ALTERNATIVES,
        draft=draft,
    )
