"""`amulet taste`: preferences learned from choices between answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from amulet_gguf.cli.options import (
    complete_profiles,
    loaded,
    loading_from,
    loading_options,
    settings_from,
    settings_options,
)
from amulet_gguf.cli.terminal import echo, echo_json, read_line

if TYPE_CHECKING:
    from amulet_gguf.amulet import Amulet
    from amulet_gguf.cli.pair import Pair
    from amulet_gguf.settings import Settings
    from amulet_gguf.taste.taste import Taste

_MAX_TOKENS: Final = 100
_ENOUGH: Final = 20  # choices: see evaluation/README.md
_EVERYDAY: Final = (
    "How do I begin to run when I have not moved for years?",
    "Explain why the sky is blue.",
    "A friend forgot my birthday. What should I write to them?",
    "What should I look at when I buy a used bicycle?",
    "How can I fall asleep more easily?",
    "Tell me about the town of Venice.",
    "What is the difference between a virus and a bacterium?",
    "How do I tell my manager that I have too much to do?",
    "Give me an idea for dinner with rice and vegetables.",
    "Why do people keep diaries?",
    "What does an interest rate do?",
    "How do I get a stain of red wine out of a shirt?",
    "Is it worth it to learn to play the piano at forty?",
    "What happens to a letter on its way?",
    "How should I prepare for an interview for a job?",
    "Describe an evening by the sea.",
    "What is a good way to save money each month?",
    "How do bees find their way home?",
    "My plant has yellow leaves. What can I do?",
    "What makes a good neighbour?",
)


@click.command()
@click.argument("name", shell_complete=complete_profiles)
@click.option(
    "--questions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Messages to answer, a file as `amulet batch` reads it. [default: you type them]",
)
@click.option(
    "--from",
    "reading",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Learn from readers' ranks in a folder of `amulet eval --read`, instead of asking.",
)
@click.option("--show", is_flag=True, help="Show what is known of each attribute, and end.")
@click.option("--json", "as_json", is_flag=True, help="Show it as one JSON object.")
@click.option("--forget", is_flag=True, help="Remove the choices and the profile made from them.")
@settings_options
@loading_options
def taste(
    name: str,
    questions: Path | None,
    reading: Path | None,
    show: bool,
    as_json: bool,
    forget: bool,
    **options: Any,
) -> None:
    """Find out what you prefer: choose between two answers, some ten times.

    What your choices say becomes profile NAME, with weights: amulet chat --profile NAME. They are kept,
    so that the same command goes on. The presets may matter, and what --prefer names beside them.

    \b
    amulet taste mine
    amulet taste mine --prefer "Answer like an old sailor." --questions questions.json
    """
    from amulet_gguf.taste import taste as tastes

    if forget:
        tastes.forget(name)
        return
    loading, settings = loading_from(options), settings_from(options, max_tokens=_MAX_TOKENS)
    found = tastes.open_taste(name, settings.prefer)
    if show or as_json:
        _show(found, as_json)
        return

    from amulet_gguf.cli.pair import told
    from amulet_gguf.evaluation.questions import sample_questions
    from amulet_gguf.evaluation.reading import preferred_pairs

    # Files are read first: a mistake in one shows before the model loads.
    pairs = None if reading is None else preferred_pairs(reading)
    messages = _typed()
    if questions is not None:
        known = {choice.messages[-1]["content"] for choice in found.choices}
        messages = _asked([q for q in sample_questions(questions, None) if q not in known])
    with loaded(loading, 4) as amulet:
        if pairs is not None:
            _read(amulet, found, pairs)
        else:
            _ask(amulet, found, settings, messages)
    echo(told(found), err=True)
    if found.preferences():
        kept = ", ".join(f"{each.name}:{each.weight:g}" for each in found.preferences())
        echo(f"profile {name}: {kept}. Use it: amulet chat --profile {name}", err=True)
    else:
        echo("that is not sure enough for a profile: choose some more", err=True)


def _ask(amulet: Amulet, taste: Taste, settings: Settings, messages: Iterator[str]) -> None:
    """Ask until nobody answers any more."""
    from amulet_gguf.cli.pair import told, write_pair
    from amulet_gguf.cli.screen import Screen

    screen = Screen()
    echo(
        "Which answer do you like better? It is the style that counts: small models err. "
        f"After some {_ENOUGH} choices much is known; Ctrl-D ends, and nothing is lost.",
        err=True,
    )
    for message in messages:
        asked = [{"role": "user", "content": message}]
        pair = write_pair(screen, amulet, taste, asked, settings)
        if pair.is_equal:
            echo("The two are the same: there is nothing to choose.", err=True)
            continue
        better = _choose(pair)
        if better is None:
            return
        if better in pair.candidates:
            pair.choose(better)
            echo(told(taste), dim=True, err=True)


def _choose(pair: Pair) -> str | None:
    """Return "A", "B", "=" for neither, or None at the end of input."""
    while (line := _line("A, B, or = for neither: ")) is not None:
        word = line.strip().upper()
        if word in (*pair.candidates, "="):
            return word
    return None


def _asked(questions: Sequence[str]) -> Iterator[str]:
    for question in questions:
        echo(f"\n{question}", bold=True, err=True)
        yield question


def _typed() -> Iterator[str]:
    """Yield messages that are typed, or that were suggested, until the end of input."""
    import random  # not at the top: every command's start would pay for it

    everyday = list(_EVERYDAY)
    random.shuffle(everyday)
    for suggested in itertools.cycle(everyday):
        line = _line(f"\nYour message, or Enter for: {suggested}\n> ")
        if line is None:
            return
        yield line.strip() or suggested


def _line(prompt: str) -> str | None:
    """Return a line that is typed, or None at the end of input."""
    echo(prompt, nl=False, err=True)
    line = read_line()
    if line is None:
        echo(err=True)
    return line


def _read(amulet: Amulet, taste: Taste, pairs: Sequence[tuple[str, str, str]]) -> None:
    """Learn from what readers preferred; what was learned from before is left out."""
    from amulet_gguf.cli.pair import features_of
    from amulet_gguf.taste.taste import Candidate, Choice

    known = {(each.messages[-1]["content"], each.better.text, each.worse.text) for each in taste.choices}
    new = [pair for pair in pairs if pair not in known]
    for number, (question, *texts) in enumerate(new, 1):
        echo(f"{number} of {len(new)}", err=True)
        messages = [{"role": "user", "content": question}]
        better, worse = map(Candidate, texts, features_of(amulet, taste, messages, texts))
        taste.add(Choice(messages, better, worse, amulet.model.path.name))


def _show(taste: Taste, as_json: bool) -> None:
    kept = {each.text: each.weight for each in taste.preferences()}
    weights = taste.weights()
    if as_json:
        record = {
            "name": taste.name,
            "choices": len(taste.choices),
            "attributes": [
                {
                    "text": each.text,
                    "mean": each.mean,
                    "deviation": each.deviation,
                    "sureness": each.sureness,
                    "weight": kept.get(each.text, 0.0),
                }
                for each in weights
            ],
        }
        echo_json(record)
        return

    from rich.table import Table

    from amulet_gguf.cli.screen import table_screen

    screen = table_screen()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ATTRIBUTE", overflow="fold")
    for title in ("LEARNED", "SURE", "IN THE PROFILE"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in weights:
        table.add_row(
            each.name,
            f"{each.mean:+.2f} ± {each.deviation:.2f}",
            f"{each.sureness:.0%}",
            f"{kept[each.text]:g}" if each.text in kept else "",
        )
    screen.print(table)
