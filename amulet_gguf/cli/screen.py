"""What is drawn: tables, columns and bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from amulet_gguf.cli.terminal import unclean
from amulet_gguf.home.text import printable

_PIPE_WIDTH: Final = 240  # columns


class Screen(Console):
    """A console to which texts are texts: a terminal obeys what rich makes of styles, nothing else."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        super().__init__(
            file=unclean(sys.stderr if stderr else sys.stdout),
            highlight=False,
            markup=False,
            emoji=False,
            **options,
        )

    def render_str(self, text: str, **options: Any) -> Text:  # before it is measured
        return super().render_str(printable(text) if self.is_terminal else text, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or not self.is_terminal:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def table_screen() -> Screen:
    """Return a screen for tables: as wide as the terminal, or as a line needs in a pipe."""
    return Screen(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
