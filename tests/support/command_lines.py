"""What a command line and the configuration come to, without a command that does anything."""

from __future__ import annotations

from typing import Any

import click
from click.testing import CliRunner

from amulet_gguf.llama.loading import Loading
from amulet_gguf.settings import Settings


def chosen(*arguments: str) -> tuple[Settings, Loading]:
    """Return the settings, and the way to load a model, that options and the configuration make."""
    from amulet_gguf.cli.options import loading_from, loading_options, settings_from, settings_options

    found: list[tuple[Settings, Loading]] = []

    @click.command()
    @settings_options
    @loading_options
    def command(**options: Any) -> None:
        found.append((settings_from(options), loading_from(options)))

    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return found[0]
