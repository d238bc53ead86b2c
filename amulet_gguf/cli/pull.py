"""`amulet models pull`: fetch a model."""

from __future__ import annotations

import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from amulet_gguf.cli.terminal import echo
from amulet_gguf.models.catalogue import CATALOGUE


def _complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in CATALOGUE if name.startswith(typed)]


@click.command(
    epilog=f"Short names: {', '.join(CATALOGUE)}. HF_TOKEN opens gated models, HF_ENDPOINT names a "
    "mirror."
)
@click.argument("name", required=False, metavar="NAME", shell_complete=_complete)
def pull(name: str | None) -> None:
    """Fetch a model from the Hugging Face hub: OWNER/REPO, OWNER/REPO:Q4_K_M, OWNER/REPO/FILE.gguf, or
    a short name.

    Stopped, it goes on where it was; the file appears when it is whole and its digest is right.
    """
    if name is None:
        raise click.UsageError(f"name a model: OWNER/REPO, or one of {', '.join(CATALOGUE)}")

    from amulet_gguf.home.paths import models_folder
    from amulet_gguf.models import hub, trial

    source = hub.parse_source(name)
    echo(f"looking for {source.repo}", err=True)
    with _Bars() as bars:
        path = hub.pull(source, models_folder(), bars.update)
    trial.trust(path)
    if not bars.names:
        echo("it is here already, as the hub has it", err=True)
    echo(path)


class _Bars:
    """A bar per file on stderr, if that is a terminal."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """The files that were fetched."""
        return list(self._tasks)

    def __enter__(self) -> _Bars:
        if sys.stderr.isatty():
            from rich import progress

            from amulet_gguf.cli.screen import Screen

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Screen(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, name: str, done: int, total: int) -> None:
        if self._progress is None:
            if name not in self._tasks:
                self._tasks[name] = None
                echo(f"fetching {name} ({total / 1e6:,.0f} MB)", err=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)
