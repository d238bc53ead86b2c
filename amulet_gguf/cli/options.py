"""Options that commands share, and what they mean to the package."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from amulet_gguf.cli.terminal import echo, read_stdin
from amulet_gguf.declaration import SEVERAL, Setting
from amulet_gguf.errors import SettingError
from amulet_gguf.home.files import read_file
from amulet_gguf.home.text import decoded
from amulet_gguf.llama.loading import LOADING, Loading
from amulet_gguf.preferences import PRESETS
from amulet_gguf.settings import SETTINGS, Settings
from amulet_gguf.system.platforms import has_unread

if TYPE_CHECKING:
    from amulet_gguf.amulet import Amulet
    from amulet_gguf.llama.model import Model

Command = TypeVar("Command", bound=Callable[..., Any])

#: Said where it does not; the model's own strength may be 1.
IDLE_AVOID: Final = "beside a preference, what to avoid counts beyond strength 1 only"
_WEIGHT = re.compile(r":(-?[0-9]+(?:\.[0-9]*)?)$")
_MAX_PROMPT_BYTES = 16 * 2**20
_PROFILE: Final = "amulet_gguf.profile"  # in a context's `meta`: values of the chosen profile
_PAPER: Final = ("alpha", "lam", "eta", "iterations")
#: Of settings that may be the name of a file: what they hold if they are not.
_WRITTEN_OUT: Final = {"schema": r"^\s*{", "grammar": r"::=|\bstart\s*:"}
_TYPES: Final = {"number": float, "whole": int}


def _stack(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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

    return load_config().names


def _model_names() -> Iterable[str]:
    from amulet_gguf.models.find import installed

    return [model.name for model in installed()]


complete_models = _completes(_model_names)
complete_profiles = _completes(_profile_names)
_COMPLETIONS: Final = {"model": complete_models, "prefer": _completes(lambda: PRESETS)}


class _Number(click.ParamType):  # type: ignore[type-arg]
    """A number, or a word that stands for one."""

    name = "number"

    def __init__(self, setting: str, declared: Setting) -> None:
        self._setting, self._declared = setting, declared

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        if isinstance(value, str) and value.lower() in self._declared.words:
            return value.lower()
        try:
            number = self._declared.parse(self._setting, str(value))
        except SettingError as error:
            self.fail(str(error), param, ctx)
        if number is None:  # "none" unsets a setting elsewhere
            self.fail(
                f"{value!r} is neither a number nor {' nor '.join(self._declared.words)}", param, ctx
            )
        return float(number)


def _option(name: str, declared: Setting) -> Callable[[Command], Command]:
    """Return the option of a setting: None, or () of several, where it is not typed."""
    long = f"--{name.replace('_', '-')}"
    names = [name, declared.flag, long] if declared.flag else [name, long]
    more: dict[str, Any] = {"metavar": declared.metavar or None}
    if declared.kind == "switch":
        names = [name, f"{long}/{declared.off}"]
        more = {}
    elif declared.kind == "choice":
        more = {"type": click.Choice(declared.choices)}
    elif declared.is_number:
        more |= {"type": _Number(name, declared) if declared.words else _TYPES[declared.kind]}
    if declared.kind in SEVERAL:
        more["multiple"] = True
    return click.option(
        *names,
        default=None,
        help=" ".join(filter(None, [declared.help, _bounds(declared)])),
        shell_complete=_COMPLETIONS.get(name),
        **more,
    )


def _bounds(declared: Setting) -> str:
    """Return the range and default of a setting as its help tells them."""
    default, parts = declared.otherwise, []
    if declared.is_number and declared.default is not None:
        default = f"{declared.default:g}"
    elif declared.kind == "choice":
        default = declared.default or declared.otherwise
    if declared.is_number and (declared.words or not declared.otherwise):
        low, high = declared.low, declared.high
        parts.append(f"{low:g} to {high:.7g}" if high < 2**31 - 1 else f"from {low}")
    if default:
        parts.append(f"default {default}" if parts else f"default: {default}")
    return f"[{'; '.join(parts)}]" if parts else ""


def _take_profile(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """Keep the values of the profile that is asked for, or of the default one."""
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
    context.meta[_PROFILE] = values


prompt_options = _stack(
    click.argument("prompt", required=False),
    click.option(
        "-f",
        "--file",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        help="Read the prompt from a file, - for stdin; with PROMPT, it follows it.",
    ),
)

#: Of a command that runs a model: how to load it.
loading_options = _stack(
    _option("model", LOADING["model"]),
    click.option(
        "--profile",
        envvar="AMULET_PROFILE",
        is_eager=True,
        expose_value=False,
        callback=_take_profile,
        shell_complete=complete_profiles,
        help='Begin with the options of a profile (amulet profiles ls); "none" with those of none.',
    ),
    *(_option(name, each) for name, each in LOADING.items() if name != "model"),
)

#: What and how to write.
settings_options = _stack(
    *(_option(name, each) for name, each in SETTINGS.items()),
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


def read_prompt(prompt: str | None, file: str | None) -> str:
    """Return the prompt: the argument, the file, both, or stdin where neither is given."""
    if prompt == "-" and file is None:
        prompt, file = None, "-"
    if prompt is None and file is None:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give it as an argument, with --file, or on stdin")
        file = "-"
    parts = [] if prompt is None else [prompt]
    if file is not None:
        parts.append(_read_text(file).strip("\n"))
    else:
        with contextlib.suppress(OSError, ValueError):  # there is no stdin
            if has_unread(sys.stdin.fileno()):
                echo("stdin is not read beside a prompt: -f - takes both", err=True)
    text = "\n\n".join(parts)
    if not text.strip():
        raise click.UsageError("the prompt is empty: say what to write about")
    return text


def _read_text(file: str) -> str:
    name = "stdin" if file == "-" else file
    try:
        if file == "-":
            return decoded(read_stdin(_MAX_PROMPT_BYTES))
        return decoded(read_file(file, _MAX_PROMPT_BYTES))
    except OSError as error:
        raise click.UsageError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise click.UsageError(f"{name} is not text in UTF-8: save it as such") from None


def preference(text: str) -> str | tuple[str, float]:
    """Return a preference as it is typed; @FILE or @FILE:WEIGHT stands for what is in a file."""
    if not text.startswith("@"):
        return text
    file, weight = text[1:], 1.0
    if (match := _WEIGHT.search(file)) and not os.path.exists(file):
        file, weight = file[: match.start()], float(match[1])
    return _read_text(file).strip(), weight


def typed_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were typed, those of the paper's parameters among them, by field."""
    given = {name: options[name] for name in SETTINGS if options[name] not in (None, ())}
    if "prefer" in given:
        given["prefer"] = list(map(preference, given["prefer"]))
    for name, begins in _WRITTEN_OUT.items():
        if name in given and not re.search(begins, given[name]):
            given[name] = _read_text(given[name])
    paper = {name: options[name] for name in _PAPER if options[name] is not None}
    if paper:
        if "strength" in given:
            raise click.UsageError(f"--strength and --{next(iter(paper))} both set the strength")
        from amulet_gguf.method.realign import strength

        given["strength"] = strength(**paper)
    return given


def settings_from(options: Mapping[str, Any], **defaults: Any) -> Settings:
    """Return the settings of a command: what was typed, else what the profile says, else the defaults.

    Args:
        options: values of `settings_options`.
        **defaults: of this command, where they differ.
    """
    profile = _profile()
    preset = options["preset"] or profile.get("preset")
    start = (Settings.paper() if preset == "paper" else Settings()).replace(**defaults)
    values = {name: each for name, each in profile.items() if name in SETTINGS}
    return dataclasses.replace(start, **{**values, **typed_settings(options)})


def loading_from(options: Mapping[str, Any]) -> Loading:
    """Return how to load the model, from the values of `loading_options` and the profile."""
    given = {name: options[name] for name in LOADING if options[name] is not None}
    profile = {name: each for name, each in _profile().items() if name in LOADING}
    return Loading(**{**profile, **given})


def _profile() -> Mapping[str, Any]:
    values: Mapping[str, Any] = click.get_current_context().meta.get(_PROFILE, {})
    return values


@contextlib.contextmanager
def loaded(loading: Loading, n_sequences: int) -> Iterator[Amulet]:
    """Load the model that was asked for, with a progress bar if that takes long."""
    from amulet_gguf.amulet import Amulet
    from amulet_gguf.cli.bar import LateBar

    with LateBar("Loading the model") as bar:
        amulet = Amulet.load(
            loading.model,
            n_sequences=n_sequences,
            progress=lambda fraction: bar.update(fraction, 1.0),
            **loading.options,
        )
    with amulet:
        yield amulet


@contextlib.contextmanager
def loaded_model(loading: Loading) -> Iterator[Model]:
    """Load a model alone, whose context is sized later."""
    from amulet_gguf.amulet import load_model
    from amulet_gguf.cli.bar import LateBar

    with LateBar("Loading the model") as bar:
        model = load_model(loading, progress=lambda fraction: bar.update(fraction, 1.0))
    with model:
        yield model
