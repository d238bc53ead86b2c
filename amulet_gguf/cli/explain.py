"""`amulet explain`: an answer, and what realignment changed in it."""

from __future__ import annotations

from pathlib import Path
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
from amulet_gguf.cli.terminal import echo, echo_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from amulet_gguf.engine.answer import Piece

_SHADES = ("", "on grey23", "on #5c3d00", "on #8a5a00", "on #c47f00")


@click.command()
@prompt_options
@settings_options
@loading_options
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page that needs nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of the text.")
def explain(
    prompt: str | None,
    file: str | None,
    html: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT and show what the preferences changed in the answer.

    Each token is shaded by how far realignment moved the choice from ordinary prompting (KL), and
    underlined where prompting would have put another token first. Below are the tokens that could have
    stood at the strongest points. Answers have 200 tokens at most unless --max-tokens says otherwise.

    \b
    amulet explain "Describe the sea" --prefer creative --strength 3
    amulet explain "Describe the sea" --prefer creative --html sea.html
    """
    loading, settings = loading_from(options), settings_from(options, max_tokens=200)
    if not settings.prefer and settings.avoid is None:
        raise click.UsageError("name something to explain with --prefer")
    text = read_prompt(prompt, file)

    from amulet_gguf.cli import explained
    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.cli.screen import Screen
    from amulet_gguf.conversation.turns import Conversation
    from amulet_gguf.home.files import write_atomically
    from amulet_gguf.settings import describe

    with (
        loaded(loading, n_sequences=settings.n_branches) as amulet,
        LateBar("Answering") as bar,
    ):
        name = amulet.model.path.name
        turn = Conversation(amulet, settings).ask(text)
        for piece in turn:
            bar.update(len(turn.pieces), settings.max_tokens + (piece.finish_reason is None))
    if settings.strength is None and turn.settings.strength == 1:
        echo(
            "This model is asked by ordinary prompting unless you say otherwise: --strength 3 realigns.",
            err=True,
        )
    failure = None
    if html:
        page = explained.page(text, describe(turn.settings), name, turn.pieces)
        try:
            write_atomically(Path(html), page)
            echo(f"written: {html}", err=True)
        except OSError as error:
            failure = f"{html} cannot be written: {error.strerror}"
    if as_json:
        record = {"prompt": text, "text": turn.text, "model": name, **explained.as_record(turn.pieces)}
        echo_json(record)
    elif failure or not html:
        show(Screen(), turn.pieces)
    if failure:
        raise click.ClickException(failure)


def show(console: Console, pieces: Sequence[Piece]) -> None:
    """Print an answer shaded, its numbers, and the alternatives at its strongest points."""
    from rich.table import Table
    from rich.text import Text

    from amulet_gguf.cli import explained

    answer = Text()
    for piece in explained.explained(pieces):
        answer.append(_marked(console, piece))
    console.print(answer)
    summary = explained.summarize(pieces)
    console.print(
        f"\n{summary.changed} of {summary.tokens} tokens changed, mean KL to ordinary prompting "
        f"{summary.mean_divergence:.3f} nats per token",
        style="bold",
    )
    for index in explained.strongest(pieces):
        why = pieces[index].explanation
        assert why is not None
        title = f"…{explained.before(pieces, index)} ▸ {pieces[index].text.strip()!r}"
        console.print(f"\n{title}  KL {why.divergence:.2f}")
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        table.add_column("  token", overflow="fold")
        for column in ("prompting", "realigned"):
            table.add_column(column, justify="right")
        for each in why.alternatives[:6]:
            table.add_row(
                f"  {each.text!r}", f"{100 * each.prompted:.1f} %", f"{100 * each.probability:.1f} %"
            )
        console.print(table)


def _marked(console: Console, piece: Piece) -> Any:
    """Return a token shaded or, where there are no colours, with its KL behind it."""
    from rich.text import Text

    assert piece.explanation is not None
    text = piece.text
    shade = _SHADES[min(len(_SHADES) - 1, int(piece.explanation.shade * len(_SHADES)))]
    changed = piece.changed
    if console.color_system is not None:
        return Text(text, style=f"{shade} {'underline' if changed else ''}".strip())
    if changed and text.strip():
        head = text[: len(text) - len(text.lstrip())]
        return Text(f"{head}«{text.strip()}»{piece.explanation.divergence:.1f}")
    return Text(text)
