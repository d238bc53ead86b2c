"""`amulet generate`: one answer, streamed."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import (
    IDLE_AVOID,
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
    from amulet_gguf.stream import Stream

_NEXT = "next: amulet chat --prefer concise, or a larger model: amulet models pull qwen2.5-0.5b"


@click.command()
@prompt_options
@settings_options
@loading_options
@click.option("--prefill", metavar="TEXT", help="Go on with an answer that begins with this.")
@click.option(
    "--show-thoughts/--hide-thoughts",
    "shows_thoughts",
    default=None,
    help="What a model thinks before it answers, on stderr. [default: on a terminal]",
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object instead of the text.")
@click.option(
    "--stats/--no-stats", default=None, help="Counts and speed on stderr. [default: on a terminal]"
)
def generate(
    prompt: str | None,
    file: str | None,
    prefill: str | None,
    shows_thoughts: bool | None,
    as_json: bool,
    stats: bool | None,
    **options: Any,
) -> None:
    """Answer PROMPT, realigned to what you prefer.

    The answer goes to stdout as it is written, and nothing else does.

    \b
    amulet generate "How do I ask for a raise?" --prefer uplifting
    amulet generate "Plan a week in Rome" --prefer concise --prefer formal:0.5 --strength 3
    amulet generate "Summarize this:" --file report.txt --prefer "Explain it to a child."
    """
    loading, settings = loading_from(options), settings_from(options)
    text = read_prompt(prompt, file)
    messages = [{"role": "user", "content": text}]
    if prefill:
        messages.append({"role": "assistant", "content": prefill})

    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.cli.terminal import Output

    output, aside = Output(), Output(err=True)
    if shows_thoughts is None:
        shows_thoughts = sys.stderr.isatty()
    with (
        loaded(loading, n_sequences=settings.n_branches) as amulet,
        LateBar("Reading the prompt") as bar,
        amulet.stream(messages=messages, settings=settings, on_prefill=bar.update) as stream,
    ):
        if settings.avoid and settings.prefer and (stream.settings.strength or 0) <= 1:
            echo(f"{IDLE_AVOID}: try --strength 3", err=True)
        try:
            for piece in stream:
                bar.close()
                if piece.kind == "thought":
                    if shows_thoughts:
                        aside.write_dim(piece.text)
                elif not as_json:
                    if piece.text:
                        aside.end_line()
                    output.write(piece.text)
        finally:
            aside.end_line()
            output.end_line()
        if as_json:
            # As `amulet batch` reads it: prompt and settings, and beside them the answer.
            record = {
                **({"messages": messages} if prefill else {"prompt": text}),
                **settings.as_record(),
                "text": stream.text,
                **({"thought": thought} if (thought := stream.thought) else {}),
                "finish_reason": stream.pieces[-1].finish_reason,
                "model": str(amulet.model.path),
                "usage": dataclasses.asdict(stream.usage),
                "timings": dataclasses.asdict(stream.timings),
            }
            echo_json(record)
        if stats or (stats is None and sys.stderr.isatty()):
            echo(_summary(stream), err=True, dim=True)
    if stats is None and sys.stderr.isatty():
        _say_what_is_next()


def _say_what_is_next() -> None:
    """After the first answer on this machine, name what to try then."""
    from amulet_gguf.home.paths import welcomed_file

    with suppress(OSError):  # it was said, or that cannot be remembered
        mark = welcomed_file()
        mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mark.touch(exist_ok=False)
        echo(f"[{_NEXT}]", err=True, dim=True)


def _summary(stream: Stream) -> str:
    usage, timings, reason = stream.usage, stream.timings, stream.pieces[-1].finish_reason
    n_answer = usage.completion_tokens - usage.thought_tokens
    of_thought = f" and {usage.thought_tokens} of thought" if usage.thought_tokens else ""
    return (
        f"[{n_answer} tokens{of_thought}, {timings.tokens_per_second:.1f} per second; "
        f"{usage.prefill_tokens} read in {timings.prefill:.2f} s; ended by {reason}]"
    )
