"""A conversation at a terminal: what is said, saved and shown."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from amulet_gguf.cli.terminal import echo
from amulet_gguf.conversation import sessions
from amulet_gguf.errors import AmuletError, PromptTooLongError, SettingError
from amulet_gguf.home.text import shortened
from amulet_gguf.settings import describe

if TYPE_CHECKING:
    from rich.console import Console

    from amulet_gguf.cli.pair import Pair
    from amulet_gguf.conversation.turns import Conversation
    from amulet_gguf.stream import Stream
    from amulet_gguf.taste.taste import Taste

_CHOOSE: Final = "/better A or /better B chooses, /better = takes A and learns nothing"
#: What one press of Ctrl-Up or Ctrl-Down changes.
STRENGTH_STEP: Final = 0.5


class Chat:
    """A conversation at a terminal, or over a pipe.

    Attributes:
        conversation: what is said.
        name: of its session.
        n_tokens: that the conversation took with the last answer.
        typed: text for the next line: what was typed while the last answer was written.
        taste: what learns from choices, while answers come in pairs.
        pair: the answers that wait for a choice.
        ask: puts a question to the user; None where there is nobody.
    """

    def __init__(self, conversation: Conversation[Stream], console: Console) -> None:
        self.conversation = conversation
        self.name = sessions.new_name()
        self.n_tokens = 0
        self.typed = ""
        self.ask: Callable[[str], str] | None = None
        self.taste: Taste | None = None
        self.pair: Pair | None = None
        self._console = console
        self._thought = ""  # before the last answer

    def tell(self, text: str) -> None:
        """Say something that is not the model's, on stderr."""
        echo(text, err=True, dim=True)

    def answer(self, text: str, draft: str | None = None) -> bool:
        """Answer a message; return whether anything was written.

        Args:
            draft: an earlier answer to it.
        """
        from amulet_gguf.cli.view import AnswerView, listening

        if self.pair is not None:
            raise SettingError(f"{_CHOOSE}, or /ab off")
        if not self._make_room(text):
            return False
        if self.taste is not None:
            return self._answer_twice(text, self.taste)
        settings = self.conversation.amulet.planner.resolve(self.conversation.settings)
        with listening() as keys, AnswerView(self._console) as view:
            turn: Stream | None = None

            def on_prefill(done: int, total: int) -> None:
                keys.poll()
                if total > done > 200:
                    view.status = f"reading {done:,} of {total:,} tokens"
                    view.draw()
                if keys.stop and turn is not None:
                    turn.cancel()

            turn = self.conversation.ask(text, draft=draft, on_prefill=on_prefill)
            view.status = ""
            begin, seconds = time.monotonic(), 0.0
            try:
                for piece in turn:
                    self._act(keys.poll(), turn)
                    if piece.kind == "thought":
                        seconds = time.monotonic() - begin
                        view.status = f"thinking, {seconds:.0f} s   Ctrl-C stops"
                        view.draw_soon()
                    elif piece.text:
                        view.write(piece.text)
                    if settings.prefer and piece.kind == "answer":
                        view.status = f"{describe(turn.settings)}   Ctrl-↑ Ctrl-↓   Ctrl-C stops"
                    if keys.stop:
                        turn.cancel()
            finally:
                turn.close()
                if turn.text:  # at once: where the terminal is gone, whatever follows fails
                    self.autosave()
        if keys.signal is not None:
            raise SystemExit(128 + keys.signal)
        self.typed = keys.typed
        self._thought = turn.thought
        if self._thought:
            self.tell(f"[thought for {seconds:.1f} s: /thoughts shows it]")
        self._report(turn)
        usage = turn.usage
        self.n_tokens = usage.prompt_tokens + usage.completion_tokens
        return bool(turn.text)

    def _answer_twice(self, text: str, taste: Taste) -> bool:
        """Answer a message with a pair; it is not said before one is chosen."""
        from amulet_gguf.cli.pair import write_pair

        conversation = self.conversation
        messages = [*conversation.messages, {"role": "user", "content": text}]
        pair = write_pair(self._console, conversation.amulet, taste, messages, conversation.settings)
        if not any(each.text for each in pair.candidates.values()):
            return False
        self.pair = pair
        if pair.is_equal:
            self.tell("[the two are the same]")
            self._go_on_with("A")
        else:
            self.tell(f"[{_CHOOSE}]")
        return True

    def choose(self, better: str) -> None:
        """Go on with an answer of the pair, "A" or "B", and learn from that; "=" takes A and learns
        nothing."""
        from amulet_gguf.cli.pair import told

        pair = self.pair
        if pair is None:
            raise SettingError("there is no pair to choose from: /ab begins")
        self._go_on_with("A" if better == "=" else better)
        if better != "=":
            pair.choose(better)
            self.tell(told(pair.taste))

    def _go_on_with(self, name: str) -> None:
        pair, self.pair = self.pair, None
        assert pair is not None
        answer = {"role": "assistant", "content": pair.candidates[name].text}
        self.conversation.messages = [*map(dict, pair.messages), answer]
        self.conversation.pieces = []
        self.n_tokens = pair.sizes[name]
        self.autosave()

    def thoughts(self) -> None:
        """Show what the model thought before its last answer."""
        self.tell(self._thought or "there was no thought")

    def _act(self, keys: list[str], turn: Stream) -> None:
        step = STRENGTH_STEP * (keys.count("c-up") - keys.count("c-down"))
        if step and turn.settings.prefer and turn.settings.strength is not None:
            with contextlib.suppress(SettingError):  # at the end of the range
                turn.adjust(round(turn.settings.strength + step, 6))

    def _report(self, turn: Stream) -> None:
        reason = turn.pieces[-1].finish_reason if turn.pieces else "cancelled"
        n_answer = turn.usage.completion_tokens - turn.usage.thought_tokens
        if reason == "cancelled":
            self.tell("[stopped]" if turn.text else "[stopped before the first word; not kept]")
        elif reason == "length" and n_answer >= turn.settings.max_tokens:
            self.tell(f"[stopped at {n_answer} tokens: /set max_tokens N allows more]")
        elif not turn.text:
            self.tell("[no answer came; the message is not kept]")
        elif reason == "length":
            self.tell("[stopped: the context is full. /drop forgets the oldest turn, /clear all]")
        if "strength" in turn.adjusted:
            self.tell(f"[strength {turn.settings.strength:g}]")

    def _make_room(self, text: str) -> bool:
        """Ask what to forget where the context is too full for an answer; nothing goes by itself."""
        conversation = self.conversation
        n_ctx = conversation.amulet.engine.n_ctx
        needed = min(conversation.settings.max_tokens, max(64, n_ctx // 8))
        turns = len(conversation.messages) // 2
        room, n = conversation.room(text, needed)
        if n > turns and room <= 0:
            raise PromptTooLongError(n_ctx - room, n_ctx)
        if n == 0 or n > turns:  # or it is the message itself that is long
            return True
        about = f"the context of {n_ctx:,} tokens is full: {max(0, room):,} are left for an answer"
        if self.ask is None:
            raise SettingError(f"{about}. /drop {n} forgets the oldest turns; or use a larger --n-ctx")
        self.tell(f"{about}.")
        try:
            reply = self.ask(f"Forget the oldest {n} of {self.turns}? [y/N] ")
        except (KeyboardInterrupt, EOFError):
            reply = "no"
        if reply.strip().lower() not in ("y", "yes"):
            self.tell("nothing was forgotten. /drop N, /clear, or amulet chat --resume --n-ctx N")
            self.typed = text  # to be sent again
            return False
        self.forget(n)
        return True

    def forget(self, turns: int) -> None:
        """Go on without the oldest turns, as another session: the one before stays whole."""
        self.save()  # if it cannot be, nothing is forgotten
        self.name = sessions.new_name()
        self.pair = None
        self.conversation.drop_oldest(turns)

    def compare(self, text: str) -> None:
        """Answer a message, or the last one again, in four ways; the conversation stays as it is."""
        from amulet_gguf.cli.columns import Columns, strengths
        from amulet_gguf.methods import four

        settings = self.conversation.settings
        if not settings.prefer and settings.avoid is None:
            raise SettingError("name something to compare with /prefer")
        messages = list(self.conversation.messages)
        if not text:
            if not messages:
                raise SettingError("there is no message to compare answers to: /compare TEXT")
            messages = messages[:-2]
            text = self.conversation.messages[-2]["content"]
        asked = [*messages, {"role": "user", "content": text}]
        amulet = self.conversation.amulet
        compared = {name: amulet.planner.resolve(each) for name, each in four(settings).items()}
        with Columns(self._console, strengths(compared)) as columns:
            amulet.compare(None, compared, columns.add, messages=asked)

    def why(self) -> None:
        """Show what the preferences changed in the last answer."""
        from amulet_gguf.cli.explain import show

        if not self.conversation.pieces:
            raise SettingError("nothing was written yet that could be explained")
        show(self._console, self.conversation.pieces)

    def save(self) -> Any:
        """Save the conversation under its name."""
        conversation = self.conversation
        model = str(conversation.amulet.model.path)
        return sessions.save(
            self.name, sessions.Session(conversation.messages, conversation.settings, model)
        )

    def save_as(self, name: str) -> Any:
        """Save the conversation under another name; one that it had by itself goes."""
        before, self.name = self.name, name
        try:
            path = self.save()
        except AmuletError:
            self.name = before
            raise
        if before != name and self.conversation.messages and sessions.is_new_name(before):
            with contextlib.suppress(AmuletError):  # nothing was saved under it
                sessions.remove(before)
        return path

    @property
    def turns(self) -> str:
        """How many there are, in words."""
        n = len(self.conversation.messages) // 2
        return f"{n} turn{'s' if n != 1 else ''}"

    def autosave(self) -> None:
        """Save what was said; a full disk must not end the conversation."""
        if not self.conversation.messages:
            return
        try:
            self.save()
        except AmuletError as error:
            self.tell(f"[not saved: {error}]")

    def resume(self, name: str, **typed: Any) -> None:
        """Go on with a session, with its cache if that was saved.

        Args:
            **typed: settings that go before those of the session.
        """
        session = sessions.load(name)
        self.pair = None
        conversation = self.conversation
        conversation.clear()
        conversation.messages.extend(session.messages)
        conversation.settings = dataclasses.replace(session.settings, **typed)
        self.name = name
        begin = time.perf_counter()
        try:
            model = conversation.amulet.model
            cached = sessions.load_cache(name, model.path, model.cache_type)
            if cached is not None:
                conversation.restore_cache(*cached)
                self.tell(
                    f"[cache of {len(cached[0].tokens):,} tokens, {time.perf_counter() - begin:.1f} s]"
                )
        except AmuletError as error:
            self.tell(f"[{error}; the conversation will be read again]")
        last = next((each["content"] for each in session.messages[::-1] if each["role"] == "user"), "")
        self.tell(f"{name}: {self.turns}" + (f", the last: {shortened(last)}" if last else ""))
