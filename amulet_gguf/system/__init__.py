"""The system beneath: what differs from one to the other, child processes, and frozen programs."""

from __future__ import annotations

from pathlib import Path


def hook_folders() -> list[str]:
    """Return where PyInstaller finds the hooks; it asks by the entry point `pyinstaller40`."""
    return [str(Path(__file__).with_name("hooks"))]
