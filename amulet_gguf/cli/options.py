"""Options that commands share, and what they mean to the package."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from amulet_gguf.preferences import PRESETS, Preference
from amulet_gguf.settings import RANGES, Settings

if TYPE_CHECKING:
    from amulet_gguf.amulet import Amulet

Command = TypeVar("Command", bound=Callable[..., Any])

_MAX_PROMPT_BYTES = 16 * 2**20


def _stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _number(*names: str, kind: type = float, help: str, **more: Any) -> Callable[[Command], Command]:
    """Declare an option for a number of `Settings`, whose range and default its help tells."""
    field = names[-1].lstrip("-").replace("-", "_")
    low, high = RANGES[field]
    default = getattr(Settings(), field)
    bounds = f"{low} to {high}" if high < 2**31 - 1 else f"from {low}"
    tail = bounds if default is None else f"{bounds}; default {default:g}"
    return click.option(*names, type=kind, help=f"{help} [{tail}]", **more)


def _apply_profile(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """Make a profile's values the defaults of the command: what is typed wins."""
    from amulet_gguf.home.config import load_config

    if context.resilient_parsing:  # a shell completes
        return
    config = load_config()
    is_named = name is not None
    name = name if is_named else config.profile
    if not name or name == "none":
        return
    values = dict(config.values(name))
    if not is_named and os.environ.get("AMULET_MODEL"):
        values.pop("model", None)  # said for this command, more than a default profile is
    if isinstance(prefer := values.get("prefer"), str):
        values["prefer"] = [prefer]
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    context.default_map = {**values, **(context.default_map or {})}


def _completes(
    names: Callable[[], Iterable[str]],
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    def complete(
        _context: click.Context, _parameter: click.Parameter, typed: str
    ) -> list[CompletionItem]:
        try:
            found = [name for name in names() if name.startswith(typed.lower())]
        except Exception:  # a shell that completes has no use for an error
            found = []
        return [CompletionItem(name) for name in found]

    return complete


def _profile_names() -> Iterable[str]:
    from amulet_gguf.home.config import load_config

    return load_config().profiles


def _model_names() -> Iterable[str]:
    from amulet_gguf.models.find import installed

    return [model.name for model in installed()]


complete_models = _completes(_model_names)
complete_profiles = _completes(_profile_names)
complete_preferences = _completes(lambda: PRESETS)


prompt_options = _stack(
    click.argument("prompt", required=False),
    click.option(
        "-f",
        "--file",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        help="Read the prompt from a file, - for stdin; with PROMPT, it follows it.",
    ),
)

_model = click.option(
    "-m",
    "--model",
    shell_complete=complete_models,
    help="File, name or prefix of a model (amulet models ls). Otherwise $AMULET_MODEL, the default "
    "model, or the bundled one.",
)
_profile = click.option(
    "--profile",
    envvar="AMULET_PROFILE",
    is_eager=True,
    expose_value=False,
    callback=_apply_profile,
    shell_complete=complete_profiles,
    help='Begin with the options of a profile (amulet profiles ls); "none" with those of none.',
)
_n_gpu_layers = click.option(
    "--n-gpu-layers", type=int, help="Layers to run on the GPU, -1 for all. [default: all, if it can]"
)
_n_threads = click.option("-t", "--n-threads", type=int, help="CPU threads. [default: physical cores]")

#: Of a command that sizes its contexts itself.
runtime_options = _stack(_model, _profile, _n_gpu_layers, _n_threads)
model_options = _stack(
    _model,
    _profile,
    click.option(
        "-c",
        "--n-ctx",
        type=int,
        help="Tokens of prompt and answer together. [default: 4096, or the model's if less]",
    ),
    _n_gpu_layers,
    _n_threads,
    click.option(
        "--rpc",
        metavar="HOST:PORT[,…]",
        help="Spread the model over llama.cpp's RPC servers, on a network that you trust.",
    ),
)

preference_options = _stack(
    click.option(
        "-p",
        "--prefer",
        multiple=True,
        metavar="TEXT[:WEIGHT]",
        shell_complete=complete_preferences,
        help="What the answer should be: one of "
        + ", ".join(PRESETS)
        + ", or a sentence of your own. Repeat for several; a negative weight pushes away.",
    ),
    _number(
        "-s",
        "--strength",
        help="0: the base model, 1: ordinary prompting, more: amplified beyond it.",
    ),
    _number(
        "--plausibility",
        help="Rule out tokens less probable than this share of the best one, by ordinary prompting.",
    ),
    click.option(
        "--adapt",
        type=click.Choice(["none", "divergence", "entropy"]),
        help="Go to the full strength at every token (none), or as far as the preference makes a "
        "difference to it, or as far as prompting is uncertain of it. [default: divergence]",
    ),
    click.option(
        "--withhold-echo/--amplify-echo",
        default=None,
        help="Amplify the words of the preference itself, or not. [default: withhold]",
    ),
    click.option(
        "--placement",
        type=click.Choice(["turn", "system"]),
        help="Say the preference at the end of your message, or of the system prompt. [default: turn]",
    ),
    click.option("--system", metavar="TEXT", help="System prompt. [default: the model's own]"),
    click.option(
        "--preset",
        type=click.Choice(["paper"]),
        help="Begin with the settings of the paper's reference implementation.",
    ),
    click.option("--alpha", type=float, help="Set the strength the paper's way. [paper: 2]"),
    click.option("--lam", type=float, help="The paper's lambda. [paper: 2]"),
    click.option("--eta", type=float, help="The paper's eta. [paper: 10]"),
    click.option("--iterations", type=int, help="The paper's T. [paper: 60]"),
)

sampling_options = _stack(
    _number("-n", "--max-tokens", kind=int, help="Length of the answer at most."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. Repeatable."),
    _number("--temperature", help="0: always the best token; more: more varied."),
    _number("--top-k", kind=int, help="Keep the best k tokens; 0: all."),
    _number("--top-p", help="Keep the best tokens up to this probability."),
    _number("--min-p", help="Keep tokens at least this times as probable as the best."),
    _number("--repeat-penalty", help="Make recent tokens less probable; 1: off."),
    _number("--repeat-last-n", kind=int, help="Tokens the penalty looks back."),
    _number("--seed", kind=int, help="Same seed, same text."),
)


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt: the argument, the file, both, or stdin where neither is given."""
    if prompt == "-" and file is None:
        prompt, file = None, "-"
    if prompt is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise click.UsageError("no prompt: give it as an argument, with --file, or on stdin")
        file = "-"
    parts = [] if prompt is None else [prompt]
    if file is not None:
        with click.open_file(file, "rb") as stream:
            data = stream.read(_MAX_PROMPT_BYTES + 1)
        name = "stdin" if file == "-" else file
        if len(data) > _MAX_PROMPT_BYTES:
            raise click.UsageError(
                f"{name} is too large for a prompt: over {_MAX_PROMPT_BYTES >> 20} MB"
            )
        try:
            parts.append(data.decode("utf-8-sig").strip("\r\n"))
        except UnicodeDecodeError:
            raise click.UsageError(f"{name} is not text in UTF-8") from None
    text = "\n\n".join(parts)
    if not text.strip():
        raise click.UsageError("the prompt is empty: say what to write about")
    return text


def settings_from(
    prefer: tuple[str, ...],
    preset: str | None,
    alpha: float | None,
    lam: float | None,
    eta: float | None,
    iterations: int | None,
    stop: tuple[str, ...],
    **numbers: Any,
) -> Settings:
    """Return settings for what was typed; options that were not typed are None."""
    import dataclasses

    given = {name: value for name, value in numbers.items() if value is not None}
    paper = {"alpha": alpha, "lam": lam, "eta": eta, "iterations": iterations}
    paper = {name: value for name, value in paper.items() if value is not None}
    if paper:
        if "strength" in given:
            raise click.UsageError(f"--strength and --{next(iter(paper))} both set the strength")
        from amulet_gguf.method.realign import strength

        given["strength"] = strength(**paper)  # type: ignore[arg-type]
    given["prefer"] = tuple(Preference.parse(text) for text in prefer)
    if stop:
        given["stop"] = stop
    return dataclasses.replace(Settings.paper() if preset == "paper" else Settings(), **given)


def model_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `model_options` out of all that was typed, for `loaded`."""
    return {name: options.pop(name) for name in ("model", "n_ctx", "n_gpu_layers", "n_threads", "rpc")}


@contextlib.contextmanager
def loaded(model: str | None, n_sequences: int, **arguments: Any) -> Iterator[Amulet]:
    """Load the model that was asked for, with a progress bar if that takes long.

    Args:
        **arguments: of `Amulet.load`.
    """
    from amulet_gguf.amulet import Amulet
    from amulet_gguf.cli.terminal import LateBar

    with LateBar("Loading the model") as bar:
        amulet = Amulet.load(
            model,
            n_sequences=n_sequences,
            progress=lambda fraction: bar.update(fraction, 1.0),
            **arguments,
        )
    with amulet:
        yield amulet
