"""A writing helper: the example of a desktop program around `amulet_gguf.AmuletService`.

    pip install 'amulet-gguf[bundled,desktop]'
    python scripts/desktop_demo.py [MODEL]

Nothing here waits for the model in the window's thread. The service loads it in the background and takes
questions meanwhile; a thread for each answer takes its pieces and hands them to Qt as signals.
"""

from __future__ import annotations

import sys
import threading

from PySide6 import QtWidgets
from PySide6.QtCore import Qt, Signal
from PySide6.QtGui import QCloseEvent, QKeySequence, QTextCursor

from amulet_gguf import PRESETS, AmuletError, AmuletService, ServiceStream, Settings

STEPS = 4  # of the slider, in 1 of strength
EXAMPLE = (
    "the meeting went ok i guess. we talked about the budget and nobody was happy but we have a plan"
)


class Window(QtWidgets.QMainWindow):
    """The window. Its signals may be emitted in any thread."""

    loaded = Signal(float)
    read = Signal(object, int, int)
    written = Signal(object, str)
    ended = Signal(object, str)

    def __init__(self, model: str | None = None, **options: int) -> None:
        super().__init__()
        self.setWindowTitle("Amulet writing helper")
        self.resize(900, 560)
        self.stream: ServiceStream | None = None

        self.source = QtWidgets.QPlainTextEdit(EXAMPLE)
        self.result = QtWidgets.QPlainTextEdit()
        self.result.setReadOnly(True)
        panes = QtWidgets.QSplitter(Qt.Orientation.Horizontal)
        panes.addWidget(_labelled("&Your text", self.source))
        panes.addWidget(_labelled("Re&write", self.result))
        panes.setSizes([1, 1])

        self.preference = QtWidgets.QComboBox()
        self.preference.setEditable(True)
        self.preference.addItems(list(PRESETS))
        self.preference.setCurrentText("formal")
        self.strength = QtWidgets.QSlider(Qt.Orientation.Horizontal)
        self.strength.setRange(0, 10 * STEPS)
        self.strength.setTickPosition(QtWidgets.QSlider.TickPosition.TicksBelow)
        self.strength.setTickInterval(STEPS)
        self.shown = QtWidgets.QLabel()
        self.shown.setMinimumWidth(self.fontMetrics().horizontalAdvance("ordinary prompting  0.00"))
        self.strength.valueChanged.connect(self.adjust)
        self.strength.setValue(3 * STEPS)
        dial = QtWidgets.QHBoxLayout()
        dial.addWidget(self.strength)
        dial.addWidget(self.shown)
        form = QtWidgets.QFormLayout()
        form.addRow("It should be &more", self.preference)
        form.addRow("S&trength", dial)
        label = form.labelForField(dial)
        if isinstance(label, QtWidgets.QLabel):
            label.setBuddy(self.strength)

        self.go = QtWidgets.QPushButton("&Rewrite")
        self.go.setShortcut(QKeySequence("Ctrl+Return"))
        self.go.clicked.connect(self.rewrite)
        self.end = QtWidgets.QPushButton("&Stop")
        self.end.setShortcut(QKeySequence("Esc"))
        self.end.setEnabled(False)
        self.end.clicked.connect(self.stop)
        buttons = QtWidgets.QHBoxLayout()
        buttons.addStretch()
        buttons.addWidget(self.end)
        buttons.addWidget(self.go)

        whole = QtWidgets.QWidget()
        column = QtWidgets.QVBoxLayout(whole)
        column.addWidget(panes, 1)
        column.addLayout(form)
        column.addLayout(buttons)
        self.setCentralWidget(whole)
        self.progress = QtWidgets.QProgressBar()
        self.progress.setMaximumWidth(200)
        self.progress.setTextVisible(False)
        self.statusBar().addPermanentWidget(self.progress)

        self.loaded.connect(self.on_loaded)
        self.read.connect(self.on_read)
        self.written.connect(self.on_written)
        self.ended.connect(self.on_ended)
        self.statusBar().showMessage("Loading the model…")
        self.service = AmuletService(model, on_load=self.loaded.emit, **options)  # type: ignore[arg-type]

    def rewrite(self) -> None:
        """Ask for a rewrite, in place of the one under way if there is one."""
        self.stop()
        self.result.clear()
        text = self.source.toPlainText().strip()
        read: list[ServiceStream] = []  # the stream, once there is one

        def on_prefill(done: int, total: int) -> None:
            if read:
                self.read.emit(read[0], done, total)

        try:
            settings = Settings(
                prefer=self.preference.currentText(),
                strength=self.strength.value() / STEPS,
                system="You rewrite what the user gives you. Write the new text and nothing else.",
                max_tokens=400,
            )
            stream = self.service.stream(
                f"Rewrite this text:\n\n{text}", settings=settings, on_prefill=on_prefill
            )
        except AmuletError as error:
            self.statusBar().showMessage(str(error))
            return
        read.append(stream)
        self.stream = stream
        self.end.setEnabled(True)
        threading.Thread(target=self.follow, args=(stream,), daemon=True).start()

    def follow(self, stream: ServiceStream) -> None:
        """Take the pieces of an answer; runs in a thread of its own."""
        reason = ""
        try:
            for piece in stream:
                self.written.emit(stream, piece.text)
                reason = piece.finish_reason or ""
            speed = stream.timings.tokens_per_second
            about = f"{stream.usage.completion_tokens} tokens, {speed:.0f} per second; ended by {reason}"
        except AmuletError as error:
            about = str(error)
        self.ended.emit(stream, about)

    def stop(self) -> None:
        """End the answer within a token; what is written stays."""
        if self.stream is not None:
            self.stream.cancel()

    def adjust(self, value: int) -> None:
        """Show the strength, and change it in the answer under way."""
        strength = value / STEPS
        name = {0.0: "off", 1.0: "ordinary prompting"}.get(strength, "")
        self.shown.setText(f"{strength:.2f}  {name}")
        if self.stream is not None:
            self.stream.adjust(strength)

    def on_loaded(self, fraction: float) -> None:
        self.progress.setValue(int(fraction * 100))
        if fraction >= 1:
            self.statusBar().showMessage("Ready")

    def on_read(self, stream: ServiceStream, done: int, total: int) -> None:
        if stream is self.stream:
            self.statusBar().showMessage("Reading your text…" if done < total else "Writing…")
            self.progress.setValue(100 * done // max(1, total))

    def on_written(self, stream: ServiceStream, text: str) -> None:
        if stream is self.stream:  # and not one that was replaced
            self.result.moveCursor(QTextCursor.MoveOperation.End)
            self.result.insertPlainText(text)
            self.progress.setValue(100)

    def on_ended(self, stream: ServiceStream, about: str) -> None:
        if stream is self.stream:
            self.stream = None
            self.end.setEnabled(False)
            self.statusBar().showMessage(about)

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802  (Qt's name)
        self.hide()  # the service ends the step it is in first
        self.service.close()
        event.accept()


def _labelled(title: str, widget: QtWidgets.QWidget) -> QtWidgets.QWidget:
    label = QtWidgets.QLabel(title)
    label.setBuddy(widget)
    box = QtWidgets.QWidget()
    column = QtWidgets.QVBoxLayout(box)
    column.setContentsMargins(0, 0, 0, 0)
    column.addWidget(label)
    column.addWidget(widget)
    return box


if __name__ == "__main__":
    application = QtWidgets.QApplication(sys.argv)
    window = Window(sys.argv[1] if len(sys.argv) > 1 else None)
    window.show()
    sys.exit(application.exec())
