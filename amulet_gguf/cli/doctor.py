"""`amulet doctor`: is everything well, and what to do where it is not."""

from __future__ import annotations

import dataclasses

import click

from amulet_gguf.cli.terminal import echo, echo_json
from amulet_gguf.home.text import on_one_line

_MARKS = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "failed": ("FAIL", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def doctor(as_json: bool) -> None:
    """Check this installation, and test its exactness and speed, in a few seconds.

    Ends with 1 if something does not work.
    """
    from amulet_gguf.checks.diagnosis import Check, diagnose

    checks: list[Check] = []
    for check in diagnose():
        checks.append(check)
        if not as_json:
            mark, color = _MARKS[check.status]
            echo(f"{mark:>4}", nl=False, fg=color)
            echo(f"  {check.name:<14}{on_one_line(check.value)}")
            if check.status != "ok":
                echo(f"{'':>20}→ {check.cure}")
    is_well = all(check.status != "failed" for check in checks)
    if as_json:
        record = {"ok": is_well, "checks": [dataclasses.asdict(check) for check in checks]}
        echo_json(record)
    if not is_well:
        raise SystemExit(1)
