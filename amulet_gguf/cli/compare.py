"""`amulet compare`: what each method makes of one prompt, side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

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
from amulet_gguf.methods import four


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

    n_sequences = 3 * settings.n_branches
    with loaded(loading, n_sequences) as amulet:
        compared = {name: amulet.planner.resolve(each) for name, each in compared.items()}
        if as_json:
            answers = amulet.compare(text, compared)
        else:
            from amulet_gguf.cli.columns import Columns, strengths
            from amulet_gguf.cli.screen import Screen

            with Columns(Screen(), strengths(compared)) as columns:
                amulet.compare(text, compared, columns.add)
            resolved = compared["amulet"]
            if resolved.strength == 1 and (not resolved.fade or resolved.fade_to == 1):
                echo(
                    "At strength 1 amulet is prompting but for rounding: --strength 3 realigns.",
                    err=True,
                )
    if as_json:
        record = {
            name: {
                "strength": compared[name].strength if compared[name].prefer else 0.0,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "pieces": [[p.text, p.changed] for p in answer.pieces if p.kind == "answer"],
                "usage": dataclasses.asdict(answer.usage),
                "timings": dataclasses.asdict(answer.timings),
            }
            for name, answer in answers.items()
        }
        echo_json(record)
