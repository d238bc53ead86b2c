"""`amulet bench`: what a step costs on this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from amulet_gguf.cli.options import loaded, loading_from, loading_options


@click.command()
@loading_options
@click.option("--rounds", type=click.IntRange(3, 1000), default=30, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of a table.")
def bench(
    rounds: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure steps, kernels, prefill and memory with a model.

    Times are medians over rounds in which every kind of step takes its turn, so that a machine that
    slows down slows all of them. On a noisy machine, trust the ratios.
    """
    from amulet_gguf.checks.benchmark import measure
    from amulet_gguf.cli.terminal import LateBar
    from amulet_gguf.llama.threads import default_threads

    loading = loading_from(options)
    n_threads = loading.n_threads or default_threads()  # chosen, so that they stay while it measures
    loading = dataclasses.replace(loading, n_ctx=loading.n_ctx or 1024, n_threads=n_threads)
    with (
        loaded(loading, n_sequences=2) as amulet,
        LateBar("Measuring") as bar,
    ):
        result = measure(amulet, rounds, bar.update)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result.model}, {result.threads} threads, {result.rounds} rounds",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("measure")
    table.add_column("median", justify="right")
    table.add_column("ratio", justify="right")
    for row in result.table():
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True).print(table)
