"""Answers side by side, while they are written and after."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from amulet_gguf.engine.answer import Piece
    from amulet_gguf.settings import Settings

_MIN_COLUMN: Final = 24
_REFRESH: Final = 0.1  # seconds


class Columns:
    """A column per answer, or one below the other where the terminal is narrow.

    On a terminal they are drawn as they grow; at the end of the `with` they stay, unless it failed.
    """

    def __init__(self, console: Console, titles: Mapping[str, str], *, marks: bool = True) -> None:
        """Begin with nothing written.

        Args:
            titles: by the names of the answers.
            marks: show which tokens plain prompting would not have chosen at their place.
        """
        self._console = console
        self._titles = titles
        self._marks = marks
        self._pieces: dict[str, list[Piece]] = {name: [] for name in titles}
        self._live: Any = None
        self._drawn_at = 0.0

    def __enter__(self) -> Columns:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(
                console=self._console,
                transient=True,
                auto_refresh=False,
                vertical_overflow="ellipsis",
            )
            self._live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is None:
            self._console.print(self._table())

    def add(self, name: str, piece: Piece) -> None:
        """Add a piece to an answer."""
        self._pieces[name].append(piece)
        if self._live is not None and time.monotonic() - self._drawn_at > _REFRESH:
            self._live.update(self._table(), refresh=True)
            self._drawn_at = time.monotonic()

    def _table(self) -> RenderableType:
        from rich import box
        from rich.table import Table

        shape = box.SIMPLE_HEAD if self._console.width >= _MIN_COLUMN * len(self._titles) else None
        if shape is not None:
            table = Table(box=shape, expand=True, pad_edge=False)
            for title in self._titles.values():
                table.add_column(title, ratio=1, overflow="fold")
            table.add_row(*(self._cell(pieces) for pieces in self._pieces.values()))
        else:
            table = Table(box=None, show_header=False, expand=True, pad_edge=False)
            table.add_column(overflow="fold")
            for name, title in self._titles.items():
                table.add_row(f"── {title} ──", style="bold")
                table.add_row(self._cell(self._pieces[name]))
                table.add_row("")
        return table

    def _cell(self, pieces: Sequence[Piece]) -> RenderableType:
        """Return a text with changed tokens styled or, where there are no styles, between « and »."""
        from rich.text import Text

        if pieces and all(piece.kind == "thought" for piece in pieces):
            return Text("thinking…", style="dim")
        pieces = [piece for piece in pieces if piece.kind == "answer"]
        marked = Text()
        for changed, run in itertools.groupby(pieces, key=lambda piece: piece.changed and self._marks):
            text = "".join(piece.text for piece in run)
            if changed and not self._console.is_terminal:
                text = f"«{text}»"
            marked.append(text, style="bold green" if changed else "")
        return marked


def strengths(methods: Mapping[str, Settings]) -> dict[str, str]:
    """Return titles for methods whose settings are resolved."""
    return {
        name: f"{name} (strength {settings.strength:.3g})" if settings.prefer else name
        for name, settings in methods.items()
    }
