"""An answer on the terminal while it is written, and the keys that act on it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from amulet_gguf.cli.terminal import Output
from amulet_gguf.home.text import printable
from amulet_gguf.system.platforms import ENDING, heeded

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.segment import Segment

    Line = list[Segment]

_REFRESH = 0.1  # seconds
_SHARE = 0.1  # of the time that drawing may take
_TAIL = 8  # lines that later text may still change: the rows of a table, the end of a list


def can_draw(console: Console) -> bool:
    """Whether lines can be drawn again: on a terminal that moves its cursor."""
    return console.is_terminal and not console.is_dumb_terminal


class AnswerView:
    """Shows text as it comes. Final lines of Markdown scroll away; the last ones are drawn again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._output = Output()
        self._text = ""
        self._n_final = 0  # lines that are on the screen for good
        self._drawn_at = 0.0
        self._pause = _REFRESH
        self._live: Any = None
        self.status = ""

    def __enter__(self) -> AnswerView:
        if can_draw(self._console):
            from rich.live import Live

            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is None:
            self._output.end_line()
            return
        lines = self._lines()
        self._live.update("")
        self._live.stop()
        self._print(lines[self._n_final :])

    def write(self, text: str) -> None:
        if self._live is None:
            self._output.write(text)
            return
        self._text += printable(text)
        self.draw_soon()

    def draw_soon(self) -> None:
        """Draw, unless that was done a moment ago."""
        if time.monotonic() - self._drawn_at > self._pause:
            self.draw()

    def draw(self) -> None:
        """Draw what there is, and the status below."""
        if self._live is None:
            return
        from rich.console import Group
        from rich.text import Text

        begin = time.monotonic()
        lines = self._lines()
        height = max(2, min(_TAIL, self._console.height - 2))
        if len(lines) - self._n_final > height:
            final = len(lines) - height
            self._print(lines[self._n_final : final])
            self._n_final = final
        tail = _joined(lines[self._n_final :])
        self._live.update(Group(tail, Text(self.status, style="dim")), refresh=True)
        self._drawn_at = time.monotonic()
        self._pause = max(_REFRESH, (self._drawn_at - begin) / _SHARE)

    def _print(self, lines: list[Line]) -> None:
        if lines:
            self._console.print(_joined(lines))

    def _lines(self) -> list[Line]:
        from rich.markdown import Markdown

        if not self._text.strip():
            return []
        return self._console.render_lines(Markdown(self._text, hyperlinks=False), pad=False)


def _joined(lines: list[Line]) -> RenderableType:
    from rich.segment import SegmentLines, Segments

    return SegmentLines(lines, new_lines=True) if lines else Segments([])


class Keys:
    """What is typed while an answer is written. Only `stop` is ever set where there is no terminal.

    Attributes:
        stop: Ctrl-C was pressed, or a signal came.
        signal: the one that asks the process to end, once the answer is kept.
        typed: text, for the next line.
    """

    def __init__(self) -> None:
        self.stop = False
        self.signal: int | None = None
        self.typed = ""
        self._input: Any = None

    def poll(self) -> list[str]:
        """Return the keys typed since, named as prompt_toolkit does ("c-up"); Ctrl-C sets `stop`."""
        if self._input is None:
            return []
        keys = [str(getattr(press.key, "value", press.key)) for press in self._input.read_keys()]
        self.typed += "".join(key for key in keys if len(key) == 1)
        self.stop = self.stop or "c-c" in keys
        return keys


@contextlib.contextmanager
def listening() -> Iterator[Keys]:
    """Take keys and signals while an answer is written, so that none falls into the engine."""
    keys = Keys()

    def stop(number: int, _frame: FrameType | None) -> None:
        keys.stop = True
        if number != signal.SIGINT:
            keys.signal = number

    with contextlib.ExitStack() as stack:
        if sys.stdin.isatty():
            from prompt_toolkit.input import create_input

            source = create_input()
            stack.enter_context(source.raw_mode())
            stack.callback(source.flush_keys)
            keys._input = source
        stack.enter_context(handling(("SIGINT", *ENDING), stop))
        yield keys


@contextlib.contextmanager
def handling(names: Iterable[str], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals: those that the system has and that are not ignored."""
    before = {number: signal.signal(number, handler) for number in heeded(*names)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave(number: int, _frame: FrameType | None) -> None:
    """Handle a signal that ends the process: in good order, with the code that shells have for it."""
    raise SystemExit(128 + number)
