"""A writing helper: the example of a desktop program around `amulet_gguf.AmuletService`.

    pip install 'amulet-gguf[bundled,desktop]'
    python scripts/desktop_demo.py [MODEL]

Nothing here waits for the model in the window's thread. The service loads it in the background and takes
questions meanwhile; a thread for each answer takes its pieces, and has the window show them.
"""

from __future__ import annotations

import difflib
import html
import re
import sys
import threading
from collections.abc import Callable
from functools import partial

from PySide6 import QtGui, QtWidgets
from PySide6.QtCore import Qt, QTimer, Signal

from amulet_gguf import PRESETS, AmuletError, AmuletService, ServiceStream, Settings
from amulet_gguf.conversation import Conversation
from amulet_gguf.models import installed

STEPS = 4  # of the slider, in 1 of strength
TASK = "You rewrite what the user gives you. Write the new text and nothing else."
EXAMPLE = "the meeting went ok i guess. nobody was happy about the budget but we have a plan"


class Window(QtWidgets.QMainWindow):
    """The window.

    Its signals may be emitted in any thread. `soon` has the window do something for a service or a
    stream, unless that one was replaced meanwhile.
    """

    soon = Signal(object, object)
    progressed = Signal(str, int, int)  # how much is done, of how much (0: nobody knows)

    def __init__(self, model: str | None = None, **options: int) -> None:
        """Begin to load a model."""
        super().__init__()
        self.setWindowTitle("Amulet writing helper")
        self.resize(960, 560)
        self.options = options
        self.conversation: Conversation[ServiceStream] | None = None
        self.stream: ServiceStream | None = None  # the answer under way
        self.path = self.original = self.text = ""
        self.later = QTimer(self, singleShot=True, interval=400)  # to see if a style stays as it is

        self.source = QtWidgets.QPlainTextEdit(EXAMPLE, placeholderText="Your text, or a selected part")
        self.result = QtWidgets.QTextEdit(readOnly=True, placeholderText="The text, rewritten")
        panes = QtWidgets.QSplitter()
        panes.addWidget(self.source)
        panes.addWidget(self.result)
        self.error = QtWidgets.QLabel(wordWrap=True)
        self.error.setStyleSheet("background: #fbe3e4; color: #8a1f11; padding: 6px")
        self.shown = QtWidgets.QLabel()
        self.strength = QtWidgets.QSlider(Qt.Orientation.Horizontal)
        self.strength.setRange(0, 10 * STEPS)
        self.shown.setBuddy(self.strength)
        whole = QtWidgets.QWidget()
        column = QtWidgets.QVBoxLayout(whole)
        column.addWidget(panes, stretch=1)
        for widget in (self.error, self.shown, self.strength):
            column.addWidget(widget)
        self.setCentralWidget(whole)
        self.progress = QtWidgets.QProgressBar(textVisible=False)
        self.statusBar().addPermanentWidget(self.progress)

        self.models = QtWidgets.QComboBox()
        for each in installed():
            self.models.addItem(each.name, str(each.path))
        self.models.addItem("Open a file…")
        self.models.activated.connect(self.on_choice)
        clipboard = QtGui.QGuiApplication.clipboard()
        actions = self.addToolBar("Actions")
        actions.addWidget(self.models)
        actions.addAction("&Paste", lambda: self.source.setPlainText(clipboard.text()))
        self.go = actions.addAction("&Rewrite", "Ctrl+Return", self.rewrite)
        self.end = actions.addAction("&Stop", "Esc", self.stop)
        self.compare = actions.addAction("Co&mpare", lambda: self.show_result())
        self.compare.setCheckable(True)
        actions.addAction("&Copy", lambda: clipboard.setText(self.text))

        self.addToolBarBreak()
        self.wishes = self.addToolBar("Preferences")
        for name in PRESETS:
            wish = self.wishes.addAction(name, lambda: self.later.start())
            wish.setCheckable(True)
            wish.setChecked(name == "formal")
        self.own = QtWidgets.QLineEdit(placeholderText="In your own words; or; in several")
        self.own.returnPressed.connect(self.later.start)
        self.wishes.addWidget(self.own)

        self.progressed.connect(self.on_progress)
        self.soon.connect(self.on_soon)
        self.later.timeout.connect(self.restyle)
        self.strength.valueChanged.connect(self.adjust)
        self.strength.setValue(3 * STEPS)
        self.on_end("Loading the model…", "")
        self.load(model)

    def on_soon(self, owner: object, do: Callable[[], None]) -> None:
        if owner in (self.service, self.stream):
            do()

    def load(self, model: str | None) -> None:
        """Begin to load a model, and return at once."""
        self.service = AmuletService(
            model,
            on_load=lambda done: self.progressed.emit("Loading the model…", int(done * 100), 100),
            **self.options,  # type: ignore[arg-type]
        )
        self.go.setEnabled(True)
        self.error.hide()
        threading.Thread(target=self.wait, args=(self.service,), daemon=True).start()

    def wait(self, service: AmuletService) -> None:
        """Tell when there is a model, or none; runs in a thread of its own."""
        try:
            path = str(service.wait_ready().model.path)
            self.soon.emit(service, partial(self.on_loaded, path))
        except AmuletError as error:
            self.soon.emit(service, partial(self.on_end, "There is no model", str(error)))

    def on_loaded(self, path: str) -> None:
        self.path = path
        self.on_progress("Ready", 0, 1)
        if self.models.findData(path) < 0:
            self.models.insertItem(0, path, path)
        self.models.setCurrentIndex(self.models.findData(path))

    def on_choice(self, index: int) -> None:
        """Close the model, and then load another: there may not be memory for both."""
        model = self.models.itemData(index)
        model = model or QtWidgets.QFileDialog.getOpenFileName(self, "Open a model", "", "*.gguf")[0]
        if not model:
            self.models.setCurrentIndex(self.models.findData(self.path))
            return
        self.stop()
        self.conversation = None
        self.go.setEnabled(False)
        threading.Thread(target=self.exchange, args=(self.service, model), daemon=True).start()

    def exchange(self, service: AmuletService, model: str) -> None:
        service.close()
        self.soon.emit(service, partial(self.load, model))

    def rewrite(self) -> None:
        """Ask for a rewrite of what is selected, or of all, in place of the one under way."""
        selected = self.source.textCursor().selection().toPlainText()
        self.original, self.text = (selected or self.source.toPlainText()).strip(), ""
        self.conversation = Conversation(self.service, Settings(system=TASK, max_tokens=400))
        self.begin(partial(self.conversation.ask, f"Rewrite this text:\n\n{self.original}"))

    def restyle(self) -> None:
        """Write the last rewrite again as it should be now: what stays the same comes sooner."""
        if self.stream is not None:
            self.later.start()  # when that one is written
        elif self.conversation is not None and self.conversation.messages:
            self.begin(self.conversation.restyle)

    def begin(self, ask: Callable[..., ServiceStream]) -> None:
        """Ask for an answer in the style that is chosen, and return at once."""
        self.stop()
        prefer = [wish.text() for wish in self.wishes.actions() if wish.isChecked()]
        prefer += [text for text in self.own.text().split(";") if text.strip()]
        on_prefill = partial(self.progressed.emit, "Reading your text…")
        try:
            stream = ask(prefer=prefer, strength=self.strength.value() / STEPS, on_prefill=on_prefill)
        except AmuletError as error:
            self.on_end("", str(error))
            return
        self.stream = stream
        self.error.hide()
        self.show_result()
        threading.Thread(target=self.follow, args=(stream,), daemon=True).start()

    def follow(self, stream: ServiceStream) -> None:
        """Take the pieces of an answer; runs in a thread of its own."""
        try:
            for _ in stream:
                self.soon.emit(stream, partial(self.show_result, stream.text))
            about = f"Ended by {stream.answer().finish_reason}"
            self.soon.emit(stream, partial(self.on_end, about, ""))
        except AmuletError as error:
            self.soon.emit(stream, partial(self.on_end, "", str(error)))

    def stop(self) -> None:
        """End the answer within a token; what is written stays."""
        if self.stream is not None:
            self.stream.cancel()

    def adjust(self, value: int) -> None:
        """Change the strength in the answer under way, or else write the last one again."""
        self.shown.setText(f"S&trength {value / STEPS:.2f}")
        if self.stream is not None:
            self.stream.adjust(value / STEPS)
        else:
            self.later.start()

    def on_end(self, about: str, error: str) -> None:
        self.stream = None
        self.on_progress(about, 0, 1)
        self.error.setText(error)
        self.error.setVisible(bool(error))
        self.show_result()

    def on_progress(self, about: str, done: int, total: int) -> None:
        self.statusBar().showMessage(about)
        self.progress.setMaximum(total)
        self.progress.setValue(done)

    def show_result(self, text: str = "") -> None:
        """Show a new text or the last one, or what is changed in it; that not while it is written."""
        if text:
            self.text = text
            self.on_progress("Writing…", 0, 0)
        self.end.setEnabled(self.stream is not None)
        if self.compare.isChecked() and self.stream is None:
            self.result.setHtml(differences(self.original, self.text))
        else:
            self.result.setPlainText(self.text)
            self.result.moveCursor(QtGui.QTextCursor.MoveOperation.End)

    def closeEvent(self, event: QtGui.QCloseEvent) -> None:  # noqa: N802  (Qt's name)
        self.hide()  # the service ends the step it is in first
        self.soon.disconnect()
        self.service.close()


def differences(before: str, after: str) -> str:
    """Return a text as HTML that shows which words of another one it has not, and which are new."""
    old, new = (re.findall(r"\w+|\s+|.", text) for text in (before, after))
    shown = ""
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = html.escape("".join(old[i:j])), html.escape("".join(new[k:m]))
        shown += come if kind == "equal" else f"<s>{gone}</s><b>{come}</b>"
    return f'<p style="white-space: pre-wrap">{shown}</p>'


if __name__ == "__main__":
    application = QtWidgets.QApplication(sys.argv)
    window = Window(*sys.argv[1:2])
    window.show()
    sys.exit(application.exec())
