"""`amulet profiles`: named bundles of options."""

from __future__ import annotations

import sys
from typing import Any

import click

from amulet_gguf.cli.options import (
    complete_profiles,
    loading_options,
    settings_options,
    typed_settings,
)
from amulet_gguf.cli.terminal import echo, echo_json
from amulet_gguf.errors import ConfigError
from amulet_gguf.home.text import on_one_line
from amulet_gguf.llama.loading import LOADING


@click.group()
def profiles() -> None:
    """Keep options under a name: preferences, strength, system prompt, sampling, model.

    Every command that runs a model takes --profile NAME; what is typed beside it wins.
    """


@profiles.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def list_profiles(as_json: bool) -> None:
    """List profiles; the default one has a star."""
    from amulet_gguf.home import config

    found = config.load_config()
    if as_json:
        echo_json({"default": found.profile, "profiles": found.profiles, "damaged": found.damaged})
        return
    if not found.names:
        echo("there is no profile yet: amulet profiles add NAME --prefer concise", err=True)
        return

    from rich.table import Table

    from amulet_gguf.cli.screen import table_screen

    screen = table_screen()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "MODEL", "STRENGTH"):
        table.add_column(title, no_wrap=True)
    table.add_column("PREFERENCES", overflow="fold")
    star = {found.profile: " *"}
    for name, values in found.profiles.items():
        prefer = values.get("prefer", "")
        table.add_row(
            name + star.get(name, ""),
            str(values.get("model", "")),
            str(values.get("strength", "")),
            prefer if isinstance(prefer, str) else ", ".join(map(str, prefer)),
        )
    for name, error in found.damaged.items():
        table.add_row(name + star.get(name, ""), "", "", on_one_line(error))
    screen.print(table)


@profiles.command()
@click.argument("name", shell_complete=complete_profiles)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show a profile as TOML."""
    from amulet_gguf.home import config

    values = config.load_config().values(name)
    if as_json:
        echo_json(values)
        return
    import tomlkit

    echo(tomlkit.dumps(values), nl=False)


@profiles.command()
@click.argument("name")
@settings_options
@loading_options
@click.option("--replace", is_flag=True, help="Replace a profile that has the name.")
@click.option("--default", "is_default", is_flag=True, help="Make it the default profile.")
def add(name: str, replace: bool, is_default: bool, **options: Any) -> None:
    """Keep options as profile NAME.

    \b
    amulet profiles add work --prefer concise --prefer formal:0.5 --strength 4 --default
    """
    from amulet_gguf.home import config

    others = {key: options[key] for key in (*LOADING, "preset") if options[key] is not None}
    values = {**typed_settings(options), **others}
    values = {key: list(each) if isinstance(each, tuple) else each for key, each in values.items()}
    if name in config.load_config().names and not replace:
        raise ConfigError(f"there is a profile {name!r} already: --replace replaces it")
    if not values:
        raise click.UsageError("name something to keep: --prefer, --strength, --model, …")
    config.set_profile(name, values)
    if is_default:
        config.set_default_profile(name)


@profiles.command()
@click.argument("name", shell_complete=complete_profiles)
def rm(name: str) -> None:
    """Remove a profile."""
    from amulet_gguf.home import config

    config.remove_profile(name)


@profiles.command()
@click.argument("name", required=False, shell_complete=complete_profiles)
@click.option("--clear", is_flag=True, help="Have no default profile.")
def default(name: str | None, clear: bool) -> None:
    """Show the default profile, or make NAME it."""
    from amulet_gguf.home import config

    if clear or name:
        config.set_default_profile(None if clear else name)
    elif current := config.load_config().profile:
        echo(current)
    else:
        echo("there is no default profile", err=True)


@profiles.command()
def edit() -> None:
    """Open the configuration in $VISUAL or $EDITOR.

    It takes the place of the old one only if it has no mistake.
    """
    from amulet_gguf.home import config
    from amulet_gguf.home.paths import config_file

    path = config_file()
    text = config.read(path) or config.SKELETON
    while True:
        edited = click.edit(text, extension=".toml")
        if edited is None:
            echo("nothing was changed", err=True)
            return
        try:
            config.write(edited)
        except ConfigError as error:
            draft = path.with_suffix(".draft.toml")
            config.write_draft(draft, edited)
            complaint = f"{error}. What you wrote is in {draft}"
            if not sys.stdin.isatty() or not click.confirm(f"{complaint}. Edit again?", err=True):
                raise ConfigError(f"{complaint}; the configuration is as before") from None
            text = edited
        else:
            echo(f"written: {path}", err=True)
            return
