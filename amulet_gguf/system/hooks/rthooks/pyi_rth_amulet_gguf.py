"""Runs before the program: a process that was started as its child does not become the program."""

from amulet_gguf.system.child import freeze_support

freeze_support()
