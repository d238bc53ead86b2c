"""`amulet bench`: what a step costs on this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import loaded, loading_from, loading_options
from amulet_gguf.cli.terminal import echo_json

if TYPE_CHECKING:
    from rich.table import Table


@click.command()
@loading_options
@click.option("--rounds", type=click.IntRange(3, 1000), default=30, show_default=True)
@click.option("--rows", "with_rows", is_flag=True, help="What steps of 1 to 32 rows cost, too.")
@click.option("--drafts", "with_drafts", is_flag=True, help="What guessing ahead saves, too.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of a table.")
def bench(
    rounds: int,
    with_rows: bool,
    with_drafts: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure steps, kernels, prefill and memory with a model.

    Times are medians over rounds in which every kind of step takes its turn, so that a machine that
    slows down slows all of them. On a noisy machine, trust the ratios.
    """
    from amulet_gguf.checks.benchmark import measure
    from amulet_gguf.checks.rows import measure_drafts, measure_rows
    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.llama.threads import default_threads

    loading = loading_from(options)
    n_threads = loading.n_threads or default_threads()  # chosen, so that they stay while it measures
    loading = dataclasses.replace(loading, n_ctx=loading.n_ctx or 1024, n_threads=n_threads)
    with (
        loaded(loading, n_sequences=2) as amulet,
        LateBar("Measuring") as bar,
    ):
        result = measure(amulet, rounds, bar.update)
        rows = measure_rows(amulet, rounds, bar.update) if with_rows else []
        drafts = measure_drafts(amulet, max(1, rounds // 10), bar.update) if with_drafts else []
    if as_json:
        record = dataclasses.asdict(result)
        if rows:
            record["rows"] = [dataclasses.asdict(each) for each in rows]
        if drafts:
            record["drafts"] = [dataclasses.asdict(each) for each in drafts]
        echo_json(record)
        return

    from amulet_gguf.cli.screen import Screen

    console = Screen(soft_wrap=True)
    title = f"{result.model}, {result.threads} threads, {result.rounds} rounds"
    console.print(_table(title, ["measure", "median", "ratio"], result.table()))
    if rows:
        costs = [
            (
                str(each.rows),
                f"{each.abreast_ms:.1f} ms",
                f"{each.abreast_ms / rows[0].abreast_ms:.2f} ×",
                f"{1000 * each.rows / each.abreast_ms:.0f}",
                f"{each.drafts_ms:.1f} ms",
            )
            for each in rows
        ]
        console.print()
        columns = ["rows", "in a sequence each", "of one row", "rows/s", "in two sequences"]
        console.print(_table("Rows of a step", columns, costs))
    if drafts:
        gains = [
            (
                each.task,
                f"{each.speed:.2f} ×" if any(of for _, of in each.guesses.values()) else "–",
                f"{each.tokens_per_step:.2f}",
                ", ".join(f"{n} of {of} ({name})" for name, (n, of) in each.guesses.items() if of)
                or "none made",
            )
            for each in drafts
        ]
        console.print()
        columns = ["task", "as fast as without", "tokens per step", "guesses that were right"]
        console.print(_table("Drafts", columns, gains))


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
