"""The command `amulet`. Heavy modules are imported inside the commands: `--help` answers at once."""

from __future__ import annotations

from typing import Any

import click

from amulet_gguf.cli.batch import batch
from amulet_gguf.cli.bench import bench
from amulet_gguf.cli.chat import chat
from amulet_gguf.cli.compare import compare
from amulet_gguf.cli.completion import completion
from amulet_gguf.cli.doctor import doctor
from amulet_gguf.cli.evaluate import evaluate
from amulet_gguf.cli.explain import explain
from amulet_gguf.cli.generate import generate
from amulet_gguf.cli.models import models
from amulet_gguf.cli.profiles import profiles
from amulet_gguf.cli.serve import serve
from amulet_gguf.cli.sessions import sessions
from amulet_gguf.cli.taste import taste
from amulet_gguf.cli.terminal import echo, fail, prepare_streams
from amulet_gguf.errors import AmuletError, SettingError
from amulet_gguf.home.text import on_one_line


class _SettingFailure(click.ClickException):
    exit_code = 2  # as for all mistakes on the command line


def _as_typed(group: click.Group, ctx: click.Context, error: SettingError) -> str:
    """Return a message that names the option, where it begins with the setting that stands for it."""
    command = group.commands.get(ctx.invoked_subcommand or "")
    message = str(error)
    for parameter in command.params if command is not None else ():
        if parameter.name == error.field and message.startswith(f"{error.field} "):
            return max(parameter.opts, key=len) + message.removeprefix(parameter.name)
    return message


class _Group(click.Group):
    """Ends every failure with one line on stderr and an exit code, as click does its own."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        prepare_streams()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:  # the streams', and what no command took for its own
            fail(error)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingError as error:
            raise _SettingFailure(on_one_line(_as_typed(self, ctx, error))) from None
        except AmuletError as error:
            raise click.ClickException(on_one_line(str(error))) from None
        except MemoryError:
            raise click.ClickException(
                "out of memory: lower --n-ctx, or choose a smaller model"
            ) from None
        except KeyboardInterrupt:
            echo(err=True)  # the shell's prompt begins on a line of its own
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="amulet-gguf", prog_name="amulet")
def main() -> None:
    """Realign GGUF models to your preferences while they write, offline."""


main.add_command(chat)
main.add_command(generate)
main.add_command(compare)
main.add_command(serve)
main.add_command(batch)
main.add_command(explain)
main.add_command(models)
main.add_command(sessions)
main.add_command(profiles)
main.add_command(taste)
main.add_command(bench)
main.add_command(evaluate)
main.add_command(doctor)
main.add_command(completion)
