"""`amulet doctor`: is everything well, and what to do where it is not."""

from __future__ import annotations

import dataclasses
import json

import click

_MARKS = {"ok": ("ok", "green"), "warning": ("note", "yellow"), "failed": ("FAIL", "red")}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def doctor(as_json: bool) -> None:
    """Check this installation, and test its exactness and speed, in a few seconds.

    Ends with 1 if something does not work.
    """
    from amulet_gguf.checks.diagnosis import Check, diagnose
    from amulet_gguf.cli.terminal import printable

    checks: list[Check] = []
    for check in diagnose():
        checks.append(check)
        if not as_json:
            mark, color = _MARKS[check.status]
            click.echo(
                f"{click.style(f'{mark:>4}', fg=color)}  {check.name:<14}{printable(check.value)}"
            )
            if check.status != "ok":
                click.echo(f"{'':>20}→ {check.cure}")
    is_well = all(check.status != "failed" for check in checks)
    if as_json:
        record = {"ok": is_well, "checks": [dataclasses.asdict(check) for check in checks]}
        click.echo(json.dumps(record, ensure_ascii=False))
    if not is_well:
        raise SystemExit(1)
