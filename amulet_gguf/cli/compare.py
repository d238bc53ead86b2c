"""`amulet compare`: what each method makes of one prompt, side by side."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import (
    loaded,
    loading_from,
    loading_options,
    prompt_options,
    read_prompt,
    settings_from,
    settings_options,
)
from amulet_gguf.methods import four
from amulet_gguf.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console, RenderableType

    from amulet_gguf.engine.answer import Piece

_MIN_COLUMN = 24
_REFRESH = 0.1  # seconds


@click.command()
@prompt_options
@settings_options
@loading_options
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of columns.")
def compare(
    prompt: str | None,
    file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT four ways at once: base, prompting, Linear Alignment, Amulet.

    All are decoded together in one context. Tokens that plain prompting would not have chosen at their
    place are marked. Answers have 200 tokens at most unless --max-tokens says otherwise.

    \b
    amulet compare "Describe the sea" --prefer creative --strength 5
    """
    loading, settings = loading_from(options), settings_from(options, max_tokens=200)
    if not settings.prefer and settings.avoid is None:
        raise click.UsageError("name something to compare with --prefer")
    text = read_prompt(prompt, file)
    compared = four(settings)

    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    pieces: dict[str, list[Piece]] = {name: [] for name in compared}
    n_sequences = 3 * settings.n_branches
    with loaded(loading, n_sequences) as amulet:
        compared = {name: amulet.planner.resolve(each) for name, each in compared.items()}
        live = Live(console=console, transient=True, auto_refresh=False, vertical_overflow="ellipsis")
        show = console.is_terminal and not as_json

        shown_at = 0.0

        def on_piece(name: str, piece: Piece) -> None:
            nonlocal shown_at
            pieces[name].append(piece)
            if show and time.monotonic() - shown_at > _REFRESH:
                live.update(columns(console, compared, pieces), refresh=True)
                shown_at = time.monotonic()

        if show:
            with live:
                answers = amulet.compare(text, compared, on_piece)
        else:
            answers = amulet.compare(text, compared, on_piece)
    if as_json:
        record = {
            name: {
                "strength": compared[name].strength if compared[name].prefer else 0.0,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "pieces": [[piece.text, piece.changed] for piece in answer.pieces],
                "usage": dataclasses.asdict(answer.usage),
                "timings": dataclasses.asdict(answer.timings),
            }
            for name, answer in answers.items()
        }
        click.echo(json.dumps(record, ensure_ascii=False))
    else:
        console.print(columns(console, compared, pieces))


def columns(
    console: Console, methods: Mapping[str, Settings], pieces: Mapping[str, Sequence[Piece]]
) -> RenderableType:
    """Return a column per method, or one below the other where the terminal is narrow."""
    from rich import box
    from rich.table import Table

    titles = {
        name: f"{name} (strength {settings.strength:.3g})" if settings.prefer else name
        for name, settings in methods.items()
    }
    shape = box.SIMPLE_HEAD if console.width >= _MIN_COLUMN * len(methods) else None
    if shape is not None:
        table = Table(box=shape, expand=True, pad_edge=False)
        for title in titles.values():
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(*(_marked(console, pieces[name]) for name in methods))
    else:
        table = Table(box=None, show_header=False, expand=True, pad_edge=False)
        table.add_column(overflow="fold")
        for name, title in titles.items():
            table.add_row(f"── {title} ──", style="bold")
            table.add_row(_marked(console, pieces[name]))
            table.add_row("")
    return table


def _marked(console: Console, pieces: Sequence[Piece]) -> RenderableType:
    """Return the text with changed tokens styled or, where there are no styles, between « and »."""
    from rich.text import Text

    from amulet_gguf.cli.terminal import printable

    marked = Text()
    for changed, run in itertools.groupby(pieces, key=lambda piece: piece.changed):
        text = printable("".join(piece.text for piece in run))
        if changed and not console.is_terminal:
            text = f"«{text}»"
        marked.append(text, style="bold green" if changed else "")
    return marked
