"""`amulet batch`: a file of prompts, answered several at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import (
    loaded_model,
    loading_from,
    loading_options,
    settings_from,
    settings_options,
)
from amulet_gguf.cli.terminal import echo, read_stdin

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from amulet_gguf.batch.journal import Journal
    from amulet_gguf.batch.records import Record
    from amulet_gguf.batch.run import BatchSize
    from amulet_gguf.llama.model import Model


_MAX_FAILURES = 5  # that are told one by one; all are in the output


def _parallel(ctx: click.Context, param: click.Parameter, value: str) -> int | None:
    """Return the number that --parallel gives, None for auto."""
    if value == "auto":
        return None
    if not value.isdecimal() or not 1 <= int(value) <= 256:
        raise click.BadParameter(f"{value!r} is neither auto nor a number from 1 to 256", ctx, param)
    return int(value)


@click.command()
@click.argument("input", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="JSONL file of the results. If it is there already, what it lacks is added.",
)
@click.option(
    "--parallel",
    callback=_parallel,
    metavar="auto|N",
    default="auto",
    show_default=True,
    help="Answers written at once: N, or as many as pay and fit into memory.",
)
@click.option(
    "--order",
    type=click.Choice(["input", "finished"]),
    default="input",
    show_default=True,
    help="Order of the finished file. While it grows, results stand as they were finished.",
)
@click.option("--dry-run", is_flag=True, help="Show counts and memory, and answer nothing.")
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Spread the work over a Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT. This package "
    "and the model file, at the same path, must be on every node and on this machine. --parallel, "
    "--n-threads and --n-gpu-layers then hold for each worker.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 10_000),
    help="Workers on the Ray cluster, which share the CPUs of their node. [default: one per GPU; "
    "without GPUs one per node, or as many as find --n-threads CPUs each]",
)
@settings_options
@loading_options
def batch(
    input: str,
    output: Path,
    parallel: int | None,
    order: str,
    dry_run: bool,
    address: str | None,
    workers: int | None,
    **options: Any,
) -> None:
    """Answer every prompt of INPUT, realigned, several at a time.

    INPUT holds one JSON object per line with "prompt" or "messages" and, where they differ from the
    options, "prefer", "strength" and any other setting; "id" and other fields are handed through. A JSON
    list and CSV with a header are read too; - is stdin.

    Run the same command again to go on where it stopped, whatever stopped it.

    \b
    amulet batch prompts.jsonl -o answers.jsonl --prefer concise
    amulet batch questions.json -o answers.jsonl --prefer uplifting --parallel 4
    amulet batch prompts.jsonl -o answers.jsonl --ray auto
    """
    if workers is not None and address is None:
        raise click.UsageError("--workers needs --ray ADDRESS")
    loading, settings = loading_from(options), settings_from(options)
    if loading.rpc is not None and address is not None:
        raise click.UsageError("--ray gives each worker a whole model, --rpc parts of one: choose")
    from amulet_gguf.batch.records import MAX_BYTES, dated, identity, read_input, read_records

    if input == "-":
        records = read_records(read_stdin(MAX_BYTES), settings)
    else:
        records = read_input(Path(input), settings)

    from amulet_gguf.amulet import Amulet
    from amulet_gguf.batch.cluster import ray_answers
    from amulet_gguf.batch.journal import Journal
    from amulet_gguf.batch.run import answers, result

    with loaded_model(loading) as loaded:
        records = dated(records, loaded.chat_template)
        path = loaded.path
        name = identity(path, loaded.cache_type)
        keys = {record.line: record.key(name) for record in records}
        if dry_run and not output.exists():
            _show(records, records, _size(loaded, records, parallel, loading.n_ctx))
            return
        with Journal(output, keys) as journal:
            todo = [record for record in records if record.line not in journal.done]
            size = _size(loaded, todo, parallel, loading.n_ctx)
            loading = dataclasses.replace(loading, model=path, n_ctx=size.n_ctx)
            if dry_run:
                _show(records, todo, size)
                return
            has_failed = False
            if not todo:
                echo(f"all {len(records)} records are done already", err=True)
            elif address is not None:
                loaded.close()  # its memory belongs to the workers
                has_failed = _run(
                    journal,
                    len(todo),
                    f"{size.parallel} at a time per worker",
                    lambda on_step: ray_answers(
                        todo,
                        address,
                        loading=loading,
                        n_sequences=size.n_sequences,
                        parallel=size.parallel,
                        n_workers=workers,
                        on_step=on_step,
                    ),
                )
            else:
                with Amulet.of(loaded, loading, size.n_sequences) as amulet:
                    has_failed = _run(
                        journal,
                        len(todo),
                        f"{size.parallel} at a time",
                        lambda on_step: (
                            (record, result(record, answer))
                            for record, answer in answers(amulet, todo, size.parallel, on_step)
                        ),
                    )
            if order == "input":
                journal.sort()
    if has_failed:
        raise SystemExit(1)


def _size(model: Model, records: Sequence[Record], parallel: int | None, n_ctx: int | None) -> BatchSize:
    from amulet_gguf.batch.run import size_batch
    from amulet_gguf.cli.bar import LateBar

    valid = [record for record in records if record.error is None]
    with LateBar("Looking at the prompts") as bar:
        return size_batch(model, valid, parallel=parallel, n_ctx=n_ctx, progress=bar.update)


def _show(records: Sequence[Record], todo: Sequence[Record], size: BatchSize) -> None:
    n_errors = sum(record.error is not None for record in todo)
    most = sum(record.settings.max_tokens for record in todo if record.error is None)
    for name, value in (
        ("records", f"{len(records):,}"),
        ("done already", f"{len(records) - len(todo):,}"),
        ("not valid", f"{n_errors:,}"),
        ("prompt tokens to read", f"{size.prompt_tokens:,} at most"),
        ("answer tokens to write", f"{most:,} at most"),
        ("at once", f"{size.parallel} answers, {size.n_sequences} sequences of {size.n_ctx:,} tokens"),
        (
            "memory",
            f"about {size.memory.total / 1e6:,.0f} MB, {size.memory.cache / 1e6:,.0f} of it the cache",
        ),
    ):
        echo(f"{name:23} {value}")


def _run(
    journal: Journal,
    total: int,
    at_once: str,
    answer: Callable[[Callable[[int], None]], Generator[tuple[Record, dict[str, Any]], None, None]],
) -> bool:
    """Take results into the journal as they come, with progress and a summary on stderr; tell whether
    all of them are failures.

    Args:
        total: results to come.
        at_once: how many, in words of the summary.
        answer: begins; calls what it is given with the tokens of all answers so far.
    """
    begin = time.monotonic()
    n_done = n_errors = n_tokens = 0
    failures: list[str] = []
    with _Progress(total) as progress:

        def on_step(tokens: int) -> None:
            nonlocal n_tokens
            n_tokens = tokens
            progress.update(n_done, n_tokens, time.monotonic() - begin)

        try:
            with contextlib.closing(answer(on_step)) as outcomes:
                for record, outcome in outcomes:
                    journal.append(record.line, outcome)
                    n_done += 1
                    if "error" in outcome:
                        n_errors += 1
                        failures.append(f"line {record.line}: {outcome['error']}")
        except KeyboardInterrupt:
            progress.close()
            echo(
                f"stopped with {len(journal.done)} records done: run the same command to go on", err=True
            )
            raise
    seconds = time.monotonic() - begin
    for failure in failures[:_MAX_FAILURES]:
        echo(failure, err=True, fg="yellow")
    if n_errors > _MAX_FAILURES:
        echo(f"… and {n_errors - _MAX_FAILURES} more errors in the output", err=True, fg="yellow")
    errors = f" ({n_errors} failed)" if n_errors else ""
    echo(
        f"{n_done} records{errors}, {n_tokens} tokens in {seconds:.1f} s: {n_tokens / seconds:.1f} "
        f"tokens/s, {at_once}",
        err=True,
    )
    return 0 < n_errors == n_done


class _Progress:
    """Records done, tokens per second and time left, on a terminal only."""

    def __init__(self, total: int) -> None:
        self._progress: Any = None
        if not sys.stderr.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        from amulet_gguf.cli.screen import Screen

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} tokens/s, left:"),
            TimeRemainingColumn(),
            console=Screen(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, rate=0.0)
        self._progress.start()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, tokens: int, seconds: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, rate=tokens / max(seconds, 1e-9))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
