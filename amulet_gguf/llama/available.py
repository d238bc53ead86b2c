"""How much memory (RAM) this process can still have: what the machine has free, or a container less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil


def available_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that can still be had.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(0, min([psutil.virtual_memory().available, *_left_by_groups(root)]))


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield what each control group that limits this process, and each above it, leaves of its limit.

    A container sees its own group as the topmost one, or under the path that the host knows it by: so
    the folders of all ancestors are looked at, and those that are not there pass for unlimited.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, limit, usage, total = "", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, total = "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        top = root / "sys/fs/cgroup" / base
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                yield most - used + _cached_files(folder, total)


def _cached_files(folder: Path, prefix: str) -> int:
    """Return the bytes of files that a group holds only because nobody else wanted the memory."""
    rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    names = (f"{prefix}active_file", f"{prefix}inactive_file")
    return sum(int(row[1]) for row in rows if len(row) == 2 and row[0] in names)
