"""A conversation whose preferences may change at any time, at the cost of what is new.

Earlier turns carry no preference, so that the base branch of one turn is the beginning of every branch
of the next, whatever is preferred then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from amulet_gguf.amulet import Amulet, Stream
from amulet_gguf.engine.answer import Piece
from amulet_gguf.engine.generation import Generation, Request
from amulet_gguf.prompts.template import Encoded, Message, conversation, with_preference
from amulet_gguf.settings import Options, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: Of each distribution, for every token.
N_ALTERNATIVES = 5


class Turn(Iterator[Piece]):
    """An answer being written. When it ends, in whatever way, it becomes part of the conversation.

    Attributes:
        stream: for its counts and times.
        pieces: those taken so far.
        settings: as they are now.
    """

    def __init__(self, owner: Conversation, generation: Generation, stream: Stream, text: str) -> None:
        self.stream = stream
        self._owner = owner
        self._generation = generation
        self._text = text
        self._is_added = False
        self.pieces: list[Piece] = []
        self.settings = owner.settings

    def __next__(self) -> Piece:
        try:
            piece = next(self.stream)
        except BaseException:
            self.close()
            raise
        self.pieces.append(piece)
        return piece

    @property
    def answer(self) -> str:
        """What is written so far."""
        return "".join(piece.text for piece in self.pieces)

    def adjust(self, strength: float) -> None:
        """Change the strength from the next token on, for this answer and those that follow.

        Raises:
            SettingError: out of range.
        """
        self.settings = self._owner.settings = self.settings.replace(strength=strength)
        self._generation.mixture = self._owner.amulet.planner.mixture(self.settings)

    def cancel(self) -> None:
        """End the answer; the pieces that are left can still be taken."""
        self.stream.cancel()

    def close(self) -> None:
        """End the answer, and keep what was written in the conversation."""
        self.stream.close()
        if not self._is_added:
            self._is_added = True
            self._owner._add(self._text, self.pieces)


class Conversation:
    """Messages between the user and the model, held in the model's memory as they grow.

    Attributes:
        messages: user and assistant in turn; the system prompt is in `settings`.
        settings: of the next answer; assign others at any time.
        pieces: of the last answer, with explanations.
    """

    def __init__(
        self, amulet: Amulet, settings: Settings | None = None, messages: Iterable[Message] = ()
    ) -> None:
        self.amulet = amulet
        self.settings = settings or Settings()
        self.messages: list[dict[str, str]] = [dict(message) for message in messages]
        self.pieces: list[Piece] = []
        self._known: Encoded | None = None

    def ask(
        self,
        text: str,
        *,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> Turn:
        """Answer a message of the user, piece by piece.

        Args:
            on_prefill: as in `Amulet.stream`.
            **options: fields of `Settings` that change, from now on.

        Raises:
            SettingError, PromptError: at once. `PromptTooLongError`: see `drop_oldest`.
            EngineError: from the iterator.
        """
        self.settings = self.settings.replace(**options)
        generation = self.amulet.engine.submit(self._request(text))
        return Turn(self, generation, Stream(self.amulet.engine, generation, on_prefill), text)

    def room(self, text: str) -> int:
        """Return how many tokens of answer a message would leave room for; may be negative."""
        return self.amulet.engine.n_ctx - max(map(len, self._request(text).branches))

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
        starts = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[: starts[turns] if turns < len(starts) else len(self.messages)]

    def clear(self) -> None:
        """Forget all turns."""
        self.messages.clear()
        self.pieces = []

    def memory(self) -> tuple[Encoded, bytes] | None:
        """Return what the model holds of the conversation, for `remember`; None if nothing."""
        known = self._encoded()
        state = known and self.amulet.engine.save(known.tokens)
        if not known or not state:
            return None
        tokens, data = state
        return Encoded(known.text if len(tokens) == len(known.tokens) else "", tokens), data

    def remember(self, held: Encoded, data: bytes) -> None:
        """Put back what `memory` returned, for the same messages and model.

        Raises:
            EngineError: it does not fit this model or context.
        """
        self.amulet.engine.restore(held.tokens, data)
        expected = self._encoded()
        if expected and expected.text == held.text:
            self._known = held

    def _request(self, text: str) -> Request:
        return self.amulet.planner.request(
            None,
            self._with(text),
            self.settings,
            reuse=True,
            is_adjustable=True,
            known=self._known,
            n_alternatives=N_ALTERNATIVES,
        )

    def _with(self, text: str) -> list[dict[str, str]]:
        return [*self.messages, {"role": "user", "content": text}]

    def _prompt(self, messages: list[dict[str, str]]) -> Encoded:
        """Return the base branch's prompt."""
        placement = self.settings.placement if self.settings.prefer else "turn"
        checked = conversation(None, messages, self.settings.system)
        template = self.amulet.planner.template
        return template.encode(with_preference(checked, None, placement), self._known)

    def _encoded(self) -> Encoded | None:
        """Return the conversation up to the end of its last answer."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return None
        prompt = self._prompt(self.messages[:-1])
        if self._known and self._known.text == prompt.text + self.messages[-1]["content"]:
            return self._known
        template = self.amulet.planner.template
        answer = self.messages[-1]["content"]
        tokens = self.amulet.model.tokenize(answer)
        return template.answered(prompt, answer, tokens.tolist())

    def _add(self, text: str, pieces: list[Piece]) -> None:
        """Add a turn. One without an answer is left out: the user can ask again."""
        answer = "".join(piece.text for piece in pieces)
        if not answer:
            return
        self.pieces = pieces
        messages = self._with(text)
        prompt = self._prompt(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        tokens = [piece.token for piece in pieces if piece.token is not None]
        written = b"".join(map(self.amulet.model.token_bytes, tokens))
        # A stop string cuts the text in the middle of what the tokens say.
        if written.decode("utf-8", "replace") == answer:
            self._known = self.amulet.planner.template.answered(prompt, answer, tokens)
