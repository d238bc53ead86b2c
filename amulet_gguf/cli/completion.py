"""`amulet completion`: what a shell needs to complete commands, models, preferences and profiles."""

from __future__ import annotations

import click

from amulet_gguf.cli.terminal import echo


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Write the completion script of a shell to stdout.

    \b
    bash: amulet completion bash > ~/.local/share/bash-completion/completions/amulet
    zsh:  amulet completion zsh > "${fpath[1]}/_amulet"
    fish: amulet completion fish > ~/.config/fish/completions/amulet.fish
    """
    from click.shell_completion import get_completion_class

    make = get_completion_class(shell)
    assert make is not None
    echo(make(context.find_root().command, {}, "amulet", "_AMULET_COMPLETE").source())
