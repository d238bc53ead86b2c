"""`amulet chat`: talk, and change what you prefer while talking."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
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
from amulet_gguf.cli.terminal import echo, read_line, unclean
from amulet_gguf.errors import AmuletError, SettingError
from amulet_gguf.home.text import on_one_line, printable
from amulet_gguf.settings import SETTINGS, describe

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

    from amulet_gguf.cli.talk import Chat


_MAX_HISTORY = 16 * 2**20  # bytes
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

    from amulet_gguf.cli.screen import Screen
    from amulet_gguf.cli.talk import Chat
    from amulet_gguf.conversation import sessions

    if resume == "":
        resume = next(iter(sessions.names()), None)
        if resume is None:
            raise SettingError("there is no saved conversation yet: amulet chat begins one")
    if resume is not None:
        sessions.load(resume)  # a mistake shows before the model loads
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    n_sequences = max(_SEQUENCES if is_terminal else 1, settings.n_branches)
    with loaded(loading, n_sequences) as amulet:
        from amulet_gguf.cli.view import handling, leave
        from amulet_gguf.conversation.turns import Conversation
        from amulet_gguf.system.platforms import ENDING, key_by_key

        talk = Chat(Conversation(amulet, settings), Screen())
        if resume is not None:  # what is typed goes before what was saved
            typed = SETTINGS if options["preset"] else typed_settings(options)
            talk.resume(resume, **{name: getattr(settings, name) for name in typed})
        take = functools.partial(next, prompted(talk), None) if is_terminal else read_line
        with handling(ENDING, leave), key_by_key(sys.stdin) if is_terminal else contextlib.nullcontext():
            failed = run(talk, take)
    if failed and not is_terminal:
        raise SystemExit(1)


def run(chat: Chat, take: Callable[[], str | None]) -> bool:
    """Answer the lines that are taken until there is none; return whether one of them failed."""
    from amulet_gguf.cli import slash

    failed = False
    while True:
        try:
            line = take()
            if line is None:
                break
            text = line.strip()
            if not text:
                continue
            if text.startswith("/") and not text.startswith("//"):
                slash.run(chat, text)
            else:
                chat.answer(text.removeprefix("/") if text.startswith("//") else text)
        except EOFError:
            break
        except KeyboardInterrupt:
            if chat.ask is None:
                raise
            chat.tell("[stopped]")
        except AmuletError as error:
            failed = True
            echo(f"Error: {on_one_line(str(error))}", err=True, fg="red")
    return failed


def prompted(chat: Chat) -> Iterator[str]:
    """Yield what is typed, until Ctrl-D."""
    session = _line_editor()
    chat.ask = session.prompt
    model = chat.conversation.amulet.model.path.stem
    chat.tell(f"{model}. Type a message; /help lists commands, Ctrl-D leaves.")
    while True:
        try:
            typed, chat.typed = chat.typed, ""
            yield session.prompt("> ", bottom_toolbar=lambda: _status(chat), default=typed)
        except KeyboardInterrupt:  # noqa: PERF203
            chat.tell("Ctrl-D or /exit leaves.")
        except EOFError:
            return


def _status(chat: Chat) -> str:
    n_ctx = chat.conversation.amulet.engine.n_ctx
    settings = printable(describe(chat.conversation.settings))
    return f" {settings}   {chat.n_tokens:,} of {n_ctx:,} tokens "


def _line_editor() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import ColorDepth, create_output

    from amulet_gguf.cli import slash
    from amulet_gguf.home.files import make_folder, read_file
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

    class SafeHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError, UnicodeError):  # a full disk, or what is no text
                super().store_string(string)

    path = history_file()
    history: Any = InMemoryHistory()
    with contextlib.suppress(OSError):  # costs the history, not the conversation
        make_folder(path.parent)
        path.touch(mode=0o600)
        read_file(path, _MAX_HISTORY)  # the editor reads all of it
        history = SafeHistory(str(path))
    colors = ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None
    return PromptSession(
        output=create_output(unclean(sys.stdout)),
        history=history,
        key_bindings=bindings,
        color_depth=colors,
        complete_while_typing=False,
        completer=SlashCompleter(),
        enable_history_search=True,
    )
