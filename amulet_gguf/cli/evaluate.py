"""`amulet eval`: whether realignment helps, measured."""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import (
    complete_models,
    loading_from,
    loading_options,
    settings_from,
    settings_options,
)
from amulet_gguf.cli.terminal import echo
from amulet_gguf.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from amulet_gguf.evaluation.run import Evaluation, Response
    from amulet_gguf.evaluation.table import Result

_PREFERENCES = ("creative", "verbose", "concise", "uplifting")
_MAX_TOKENS = 128
_SHOWN = (
    "read_wins",
    "read_broken",
    "win_rate",
    "no_judge",
    "reward",
    "likelihood",
    "words",
    "repetition",
    "unfinished",
    "echo",
    "perplexity",
)
_WIDTH = 120  # columns: a wider table than the terminal is better than a folded one
_N_ANSWERS = 12  # (question, preference) pairs that the page shows side by side


@click.command("eval")
@click.argument(
    "questions", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1, required=True
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for answers, scores, tables and report. What is in it already is not done again.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Draw so many questions of each file. [default: all]"
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME[:SETTINGS]",
    help="One of base, prompting, linear-alignment, amulet (the other options as they are), paper; or "
    "your own, as strong:strength=8,temperature=0.7 or mild:paper,strength=3. Repeat. "
    "[default: the first four]",
)
@click.option(
    "--reward",
    metavar="MODEL",
    shell_complete=complete_models,
    help="Another model than the one judged: how probable it finds the answers.",
)
@click.option(
    "--judge",
    metavar="MODEL",
    shell_complete=complete_models,
    help="A model that compares answers in pairs.",
)
@click.option(
    "--against",
    default="prompting",
    show_default=True,
    metavar="NAME",
    help="The method that readers' ranks and the judge's are told against.",
)
@click.option(
    "--read",
    is_flag=True,
    help="Write reading.html too, on which people rank the answers blind. What it exports goes into the "
    "folder, and the same command again reports it.",
)
@click.option("--parallel", type=click.IntRange(1, 256), help="Answers at once. [default: as batch]")
@settings_options
@loading_options
def evaluate(
    questions: tuple[Path, ...],
    output: Path,
    limit: int | None,
    methods: tuple[str, ...],
    reward: str | None,
    judge: str | None,
    against: str,
    read: bool,
    parallel: int | None,
    **options: Any,
) -> None:
    """Compare methods on QUESTIONS, for several preferences.

    QUESTIONS are files as `amulet batch` reads them. Every method answers every question for every
    preference; the answers are measured, and the folder gets results.csv, results.json, report.md and
    report.html. Answers have 128 tokens at most unless --max-tokens says otherwise.

    Run the same command again to go on where it stopped.

    \b
    amulet eval questions.json -o evaluation --limit 20
    amulet eval questions.json -o evaluation --reward other.gguf --judge other.gguf \\
        --method prompting --method amulet --method strong:strength=8 --prefer concise
    """
    settings = settings_from(options, max_tokens=_MAX_TOKENS)
    if any(preference.weight != 1 for preference in settings.prefer):
        raise click.UsageError("a preference has no weight here: strength is the methods' affair")
    preferences = [preference.name for preference in settings.prefer] or _PREFERENCES
    shared = settings.replace(prefer=())

    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.evaluation.questions import sample_questions
    from amulet_gguf.evaluation.reading import read_ranks, write_page
    from amulet_gguf.evaluation.report import html, markdown, write_table
    from amulet_gguf.evaluation.run import Evaluation
    from amulet_gguf.evaluation.table import tabulate
    from amulet_gguf.evaluation.text_measures import MEASURES
    from amulet_gguf.home.files import write_atomically
    from amulet_gguf.methods import method

    named = dict(method(written, shared) for written in methods or METHODS)
    evaluation = Evaluation(
        folder=output,
        questions=[q for path in questions for q in sample_questions(path, limit, shared.seed or 0)],
        preferences=preferences,
        methods=named,
        loading=loading_from(options),
        reward=reward,
        judge=judge,
        against=against,
    )
    begin = time.monotonic()
    with _Bars(LateBar) as bars:
        responses, values = evaluation.run(parallel=parallel, progress=bars.update)
    results = tabulate(values)
    readers = read_ranks(output)
    groups = evaluation.groups(responses) if read or readers else []
    about = _about(evaluation, questions)
    if readers:
        n_read = sum(any(ranks.covers(group) for ranks in readers) for group in groups)
        about["readers"] = f"{len(readers)}, who ranked {n_read} of {len(groups)} groups"
        echo(f"readers: {about['readers']}", err=True)
    if readers or judge:
        about["compared to"] = against
    write_table(output, results)
    write_atomically(output / "report.md", markdown(results, about, MEASURES))
    examples = _examples(evaluation, responses)
    write_atomically(output / "report.html", html(results, about, MEASURES, examples))
    if read:
        echo(f"for readers: {write_page(output, groups)}", err=True)
    _show(results)
    echo(
        f"{len(responses)} answers in {time.monotonic() - begin:.0f} s; see {output / 'report.html'}",
        err=True,
    )


class _Bars:
    """One progress bar after another, each for what is being done now."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._what = ""
        self._bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.__exit__()
            self._what, self._bar = what, self._make(what)
        self._bar.update(done, total)


def _about(evaluation: Evaluation, questions: Sequence[Path]) -> dict[str, str]:
    from importlib.metadata import version

    from amulet_gguf import __version__
    from amulet_gguf.models.find import find_model

    about = {
        "model": find_model(evaluation.loading.model).name,
        "questions": f"{len(evaluation.questions)} of {', '.join(path.name for path in questions)}",
        "reward model": Path(evaluation.reward).name if evaluation.reward else "none",
        "judge": Path(evaluation.judge).name if evaluation.judge else "none",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": f"amulet-gguf {__version__}, llama-cpp-python {version('llama-cpp-python')}",
        "command": shlex.join(["amulet", *sys.argv[1:]]),
    }
    for name, settings in evaluation.methods.items():
        about[f"method {name}"] = json.dumps(_changes(settings), ensure_ascii=False)
    return about


def _changes(settings: Any) -> dict[str, Any]:
    """Return the fields that differ from the defaults."""
    from amulet_gguf.settings import Settings

    default = Settings().as_record()
    return {name: value for name, value in settings.as_record().items() if value != default[name]}


def _examples(evaluation: Evaluation, responses: Sequence[Response]) -> list[dict[str, str]]:
    """Return the answers to the first questions, for each preference, base's with every one."""
    shown: list[dict[str, str]] = []
    pairs = [(q, p) for q in range(len(evaluation.questions)) for p in evaluation.preferences]
    for question, preference in pairs[:_N_ANSWERS]:
        shown.extend(
            {
                "question": response.prompt,
                "preference": preference,
                "method": response.method,
                "text": response.text,
            }
            for response in responses
            if response.question == question and response.preference in (preference, "")
        )
    return shown


def _cell(result: Result | None, digits: int) -> str:
    return "" if result is None or math.isnan(result.value) else f"{result.value:.{digits}f}"


def _show(results: Sequence[Result]) -> None:
    """Print the measures that matter most, over all preferences."""
    from rich.table import Table

    from amulet_gguf.cli.screen import Screen
    from amulet_gguf.evaluation.table import ALL, by_method
    from amulet_gguf.evaluation.text_measures import MEASURES

    by_name = by_method(results, ALL)
    measures = [name for name in _SHOWN if any(name in row for row in by_name.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for name in measures:
        table.add_column(name, justify="right")
    for method, row in by_name.items():
        cells = [_cell(row.get(name), MEASURES[name].digits) for name in measures]
        table.add_row(method, *cells)
    console = Screen()
    console.width = max(console.width, _WIDTH)
    console.print(table)
