"""The desktop example, driven: it rewrites its text, and ends when the first words are there.

They are written to the file that $AMULET_WORDS names.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

from PySide6.QtCore import QTimer
from PySide6.QtWidgets import QApplication, QMainWindow

run = QApplication.exec


def drive(_: Any = None) -> int:
    """Do as `QApplication.exec`, and press the button."""
    window: Any = next(each for each in QApplication.topLevelWidgets() if isinstance(each, QMainWindow))
    window.go.trigger()
    timer = QTimer()

    def look() -> None:
        if window.text:
            Path(os.environ["AMULET_WORDS"]).write_text(window.text, "utf-8")
            window.close()

    timer.timeout.connect(look)
    timer.start(10)
    return run()


QApplication.exec = drive  # type: ignore[method-assign]
runpy.run_module("desktop_demo", run_name="__main__")
