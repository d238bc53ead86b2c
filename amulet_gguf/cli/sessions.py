"""`amulet sessions`: the conversations that `amulet chat` saved."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from click.shell_completion import CompletionItem

from amulet_gguf.cli.terminal import echo, echo_json
from amulet_gguf.errors import AmuletError
from amulet_gguf.home.text import on_one_line


def _complete(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from amulet_gguf.conversation import sessions

    try:
        return [CompletionItem(name) for name in sessions.names() if name.startswith(typed)]
    except AmuletError:  # a shell that completes has no use for one
        return []


@click.group()
def sessions() -> None:
    """List, remove and export saved conversations."""


@sessions.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON list.")
def list_sessions(as_json: bool) -> None:
    """List saved conversations, the newest first."""
    from amulet_gguf.conversation import sessions

    rows: list[dict[str, Any]] = []
    for name in sessions.names():
        row: dict[str, Any] = {"name": name}
        try:
            session = sessions.load(name)
            first = session.messages[0]["content"] if session.messages else ""
            row |= {
                "turns": len(session.messages) // 2,
                "saved_at": session.saved_at,
                "memory": sessions.session_path(name).with_suffix(".kv").exists(),
                "first": first,
            }
        except AmuletError as error:
            row["error"] = str(error)
        rows.append(row)
    if as_json:
        echo_json(rows)
        return
    if not rows:
        echo("no conversation is saved yet: amulet chat begins one", err=True)
        return

    from rich.table import Table

    from amulet_gguf.cli.screen import table_screen

    screen = table_screen()
    table = Table(box=None, pad_edge=False, header_style="bold", expand=screen.is_terminal)
    for title in ("NAME", "TURNS", "CACHE", "SAVED (UTC)"):
        table.add_column(title, no_wrap=True)
    table.add_column("BEGINS", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        first = on_one_line(row.get("error") or row["first"])
        saved_at = str(row.get("saved_at", ""))[:16].replace("T", " ")
        turns = str(row.get("turns", "?"))
        table.add_row(row["name"], turns, "yes" if row.get("memory") else "", saved_at, first)
    screen.print(table)


@sessions.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=_complete)
def remove(names: tuple[str, ...]) -> None:
    """Delete saved conversations."""
    from amulet_gguf.conversation import sessions

    for name in names:
        sessions.remove(name)
        echo(f"removed: {name}", err=True)


@sessions.command("export")
@click.argument("name", shell_complete=_complete)
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of Markdown.")
def export(name: str, as_json: bool) -> None:
    """Write a conversation to stdout, as Markdown."""
    from amulet_gguf.conversation import sessions
    from amulet_gguf.settings import describe

    session = sessions.load(name)
    if as_json:
        echo_json(dataclasses.asdict(session), indent=1)
        return
    echo(f"# {name}\n")
    echo(f"{session.model.rsplit('/', 1)[-1]}, {describe(session.settings)}, {session.saved_at}")
    for message in session.messages:
        echo(f"\n## {'You' if message['role'] == 'user' else 'Answer'}\n\n{message['content']}")
