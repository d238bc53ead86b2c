"""`amulet chat`: talk, and change what you prefer while talking."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import (
    loaded,
    loading_from,
    loading_options,
    settings_from,
    settings_options,
    typed_settings,
)
from amulet_gguf.conversation import sessions
from amulet_gguf.errors import AmuletError, PromptTooLongError, SettingError
from amulet_gguf.settings import SETTINGS, describe

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

    from amulet_gguf.conversation.turns import Conversation, Turn

_SEQUENCES = 3  # memory for two preferences at once; for more, it grows


@click.command()
@settings_options
@loading_options
@click.option(
    "--resume",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Go on with a saved conversation, without a name with the last one.",
)
def chat(
    resume: str | None,
    **options: Any,
) -> None:
    """Talk to a model and change preferences while talking.

    /prefer concise and /strength 3 act on the next answer, Ctrl-Up and Ctrl-Down on the next token,
    and the conversation is not read again. /why shows what they changed; /help lists all commands.
    Every answer is saved: amulet chat --resume goes on. Without a terminal, each line of stdin is a
    message.
    """
    loading, settings = loading_from(options), settings_from(options)

    from rich.console import Console

    if resume == "":
        resume = next(iter(sessions.names()), None)
        if resume is None:
            raise SettingError("there is no saved conversation yet: amulet chat begins one")
    if resume is not None:
        sessions.load(resume)  # a mistake shows before the model loads
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    n_sequences = max(_SEQUENCES if is_terminal else 1, 1 + len(settings.prefer))
    console = Console(highlight=False, markup=False, emoji=False)
    with loaded(loading, n_sequences) as amulet:
        from amulet_gguf.conversation.turns import Conversation

        chat = Chat(Conversation(amulet, settings), console)
        if resume is not None:  # what is typed goes before what was saved
            typed = SETTINGS if options["preset"] else typed_settings(options)
            chat.resume(resume, **{name: getattr(settings, name) for name in typed})
        lines = chat.prompted() if is_terminal else (line.rstrip("\n") for line in sys.stdin)
        failed = chat.run(lines)
    if failed and not is_terminal:
        raise SystemExit(1)


class Chat:
    """A conversation at a terminal, or over a pipe.

    Attributes:
        conversation: what is said.
        name: of its session.
        n_tokens: that the conversation took with the last answer.
    """

    def __init__(self, conversation: Conversation, console: Console) -> None:
        self.conversation = conversation
        self.name = sessions.new_name()
        self.n_tokens = 0
        self._console = console
        self._typed = ""  # while the last answer was written
        self._confirm: PromptSession[str] | None = None

    def run(self, lines: Iterable[str]) -> bool:
        """Answer lines until they end; return whether one of them failed."""
        from amulet_gguf.cli import slash

        failed = False
        for line in lines:
            text = line.strip()
            if not text:
                continue
            try:
                if text.startswith("/") and not text.startswith("//"):
                    slash.run(self, text)
                else:
                    self.answer(text.removeprefix("/") if text.startswith("//") else text)
            except EOFError:
                break
            except AmuletError as error:
                failed = True
                click.secho(f"Error: {error}", err=True, fg="red")
        return failed

    def tell(self, text: str) -> None:
        """Say something that is not the model's, on stderr."""
        from amulet_gguf.cli.terminal import printable

        click.secho(printable(text), err=True, dim=True)

    def answer(self, text: str) -> bool:
        """Answer a message; return whether anything was written."""
        from amulet_gguf.cli.view import AnswerView, listening

        if not self._make_room(text):
            return False
        settings = self.conversation.settings
        with listening() as keys, AnswerView(self._console) as view:
            turn: Turn | None = None

            def on_prefill(done: int, total: int) -> None:
                keys.poll()
                if total > done > 200:
                    view.status = f"reading {done:,} of {total:,} tokens"
                    view.draw()
                if keys.stop and turn is not None:
                    turn.cancel()

            turn = self.conversation.ask(text, on_prefill=on_prefill)
            view.status = ""
            try:
                for piece in turn:
                    view.write(piece.text)
                    self._act(keys.poll(), turn)
                    if settings.prefer:
                        view.status = f"{describe(turn.settings)}   Ctrl-↑ Ctrl-↓   Ctrl-C stops"
                    if keys.stop:
                        turn.cancel()
            finally:
                turn.close()
            self._typed = keys.typed
        self._report(turn, settings.strength)
        usage = turn.stream.usage
        self.n_tokens = usage.prompt_tokens + usage.completion_tokens
        self.autosave()
        return bool(turn.answer)

    def _act(self, keys: list[str], turn: Turn) -> None:
        from amulet_gguf.cli.slash import STRENGTH_STEP

        step = STRENGTH_STEP * (keys.count("c-up") - keys.count("c-down"))
        if step and turn.settings.prefer:
            with contextlib.suppress(SettingError):  # at the end of the range
                turn.adjust(round(turn.settings.strength + step, 6))

    def _report(self, turn: Turn, strength: float) -> None:
        reason = turn.pieces[-1].finish_reason if turn.pieces else "cancelled"
        usage = turn.stream.usage
        if reason == "cancelled":
            self.tell("[stopped]" if turn.answer else "[stopped before the first word; not kept]")
        elif reason == "length" and usage.completion_tokens >= turn.settings.max_tokens:
            self.tell(f"[stopped at {usage.completion_tokens} tokens: /set max_tokens N allows more]")
        elif reason == "length":
            self.tell("[stopped: the context is full. /drop forgets the oldest turn, /clear all]")
        if turn.settings.strength != strength:
            self.tell(f"[strength {turn.settings.strength:g}]")

    def _make_room(self, text: str) -> bool:
        """Ask what to forget where the context is too full for an answer; nothing goes by itself."""
        conversation = self.conversation
        n_ctx = conversation.amulet.engine.n_ctx
        needed = min(conversation.settings.max_tokens, max(64, n_ctx // 8))
        room = conversation.room(text)
        if room >= needed:
            return True
        turns = len(conversation.messages) // 2
        kept = list(conversation.messages)
        for n in range(1, turns + 1):
            conversation.messages[:] = kept
            conversation.drop_oldest(n)
            if conversation.room(text) >= needed:
                break
        else:
            conversation.messages[:] = kept
            if room > 0:
                return True  # it is the message itself that is long
            raise PromptTooLongError(n_ctx - room, n_ctx)
        conversation.messages[:] = kept
        about = f"the context of {n_ctx:,} tokens is full: {max(0, room):,} are left for an answer"
        if self._confirm is None:
            raise SettingError(f"{about}. /drop {n} forgets the oldest turns; or use a larger --n-ctx")
        self.tell(f"{about}.")
        reply = self._confirm.prompt(f"Forget the oldest {n} of {turns} turns? [y/N] ")
        if reply.strip().lower() not in ("y", "yes"):
            self.tell("nothing was forgotten. /drop N, /clear, or amulet chat --resume --n-ctx N")
            self._typed = text  # to be sent again
            return False
        self.forget(n)
        return True

    def forget(self, turns: int) -> None:
        """Go on without the oldest turns, as another session: the one before stays whole."""
        self.save()  # if it cannot be, nothing is forgotten
        self.name = sessions.new_name()
        self.conversation.drop_oldest(turns)

    def compare(self, text: str) -> None:
        """Answer a message, or the last one again, in four ways; the conversation stays as it is."""
        from amulet_gguf.cli.compare import columns
        from amulet_gguf.methods import four

        settings = self.conversation.settings
        if not settings.prefer:
            raise SettingError("name something to compare with /prefer")
        messages = list(self.conversation.messages)
        if not text:
            if not messages:
                raise SettingError("there is no message to compare answers to: /compare TEXT")
            messages = messages[:-2]
            text = self.conversation.messages[-2]["content"]
        asked = [*messages, {"role": "user", "content": text}]
        compared = four(settings)
        answers = self.conversation.amulet.compare(None, compared, messages=asked)
        pieces = {name: answer.pieces for name, answer in answers.items()}
        self._console.print(columns(self._console, compared, pieces))

    def why(self) -> None:
        """Show what the preferences changed in the last answer."""
        from amulet_gguf.cli.explain import show

        if not self.conversation.pieces:
            raise SettingError("there is no answer to explain yet")
        show(self._console, self.conversation.pieces)

    def save(self) -> Any:
        """Save the conversation under its name."""
        conversation = self.conversation
        model = str(conversation.amulet.model.path)
        return sessions.save(
            self.name, sessions.Session(conversation.messages, conversation.settings, model)
        )

    def autosave(self) -> None:
        """Save what was said; a full disk must not end the conversation."""
        if not self.conversation.messages:
            return
        try:
            self.save()
        except AmuletError as error:
            self.tell(f"[not saved: {error}]")

    def resume(self, name: str, **typed: Any) -> None:
        """Go on with a session, from what the model held of it if that was saved.

        Args:
            **typed: settings that go before those of the session.
        """
        session = sessions.load(name)
        conversation = self.conversation
        conversation.clear()
        conversation.messages.extend(session.messages)
        conversation.settings = dataclasses.replace(session.settings, **typed)
        self.name = name
        begin = time.perf_counter()
        try:
            held = sessions.load_memory(name, conversation.amulet.model.path)
            if held is not None:
                conversation.remember(*held)
                self.tell(
                    f"[memory of {len(held[0].tokens):,} tokens, {time.perf_counter() - begin:.1f} s]"
                )
        except AmuletError as error:
            self.tell(f"[{error}; the conversation will be read again]")
        self.tell(f"{name}: {len(session.messages) // 2} turns")

    def prompted(self) -> Iterator[str]:
        """Yield what is typed, until Ctrl-D."""
        session = self._line_editor()
        self._confirm = session
        model = self.conversation.amulet.model.path.stem
        self.tell(f"{model}. Type a message; /help lists commands, Ctrl-D leaves.")
        while True:
            try:
                typed, self._typed = self._typed, ""
                yield session.prompt("> ", bottom_toolbar=self._status, default=typed)
            except KeyboardInterrupt:  # noqa: PERF203
                self.tell("Ctrl-D or /exit leaves.")
            except EOFError:
                return

    def _status(self) -> str:

        n_ctx = self.conversation.amulet.engine.n_ctx
        return f" {describe(self.conversation.settings)}   {self.n_tokens:,} of {n_ctx:,} tokens "

    def _line_editor(self) -> PromptSession[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import CompleteEvent, Completer, Completion
        from prompt_toolkit.document import Document
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import ColorDepth

        from amulet_gguf.cli import slash
        from amulet_gguf.home.paths import history_file

        class SlashCompleter(Completer):
            def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
                typed = document.text_before_cursor
                for word in slash.complete(typed):
                    yield Completion(word, -len(typed.split(" ")[-1]))

        bindings = KeyBindings()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        path = history_file()
        history: Any = InMemoryHistory()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            history = FileHistory(str(path))
        except OSError:
            pass  # a disk that cannot be written costs the history, not the conversation
        colors = ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None
        return PromptSession(
            history=history,
            key_bindings=bindings,
            color_depth=colors,
            complete_while_typing=False,
            completer=SlashCompleter(),
            enable_history_search=True,
        )
