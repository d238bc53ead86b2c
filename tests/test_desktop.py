"""The desktop example, without a screen."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fixture_types import Tiny

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
QtCore = pytest.importorskip("PySide6.QtCore", exc_type=ImportError)
QtGui = pytest.importorskip("PySide6.QtGui", exc_type=ImportError)
QtWidgets = pytest.importorskip("PySide6.QtWidgets", exc_type=ImportError)

# Never collected: Qt's objects must not die in whatever thread the collector runs.
WINDOWS: list[Any] = []
SCRIPT = Path(__file__).parent.parent / "scripts" / "desktop_demo.py"


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("desktop_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def application() -> Any:
    return QtWidgets.QApplication.instance() or QtWidgets.QApplication(["test"])


@pytest.fixture
def make(demo: Any, application: Any, tiny: Tiny) -> Iterator[Callable[..., Any]]:
    before = set(threading.enumerate())
    windows = []

    def make(model: str | None = None) -> Any:
        window = demo.Window(model or str(tiny("llama")), n_ctx=1024, n_threads=1)
        window.show()
        windows.append(window)
        WINDOWS.append(window)
        return window

    yield make
    for window in windows:
        window.close()
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, threading.enumerate()
        application.processEvents()


@pytest.fixture
def until(application: Any) -> Callable[[Callable[[], bool]], None]:
    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            application.processEvents()
            time.sleep(0.001)

    return until


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text("utf-8").splitlines()) < 250


def button(window: Any, text: str) -> Any:
    actions = window.findChildren(QtGui.QAction)
    return next(action for action in actions if action.text().replace("&", "") == text)


def wish(window: Any, name: str) -> Any:
    return next(action for action in window.wishes.actions() if action.text() == name)


def test_a_rewrite_streams_and_says_how_it_ended(make: Any, until: Any) -> None:
    window = make()
    lengths: list[int] = []
    window.result.textChanged.connect(lambda: lengths.append(len(window.result.toPlainText())))
    window.go.trigger()
    assert window.end.isEnabled()
    until(lambda: window.stream is None)
    assert len(set(lengths)) > 5
    assert "Ended by" in window.statusBar().currentMessage()
    assert not window.end.isEnabled()


def test_what_is_selected_alone_is_rewritten_or_what_was_pasted(
    make: Any, until: Any, application: Any
) -> None:
    window = make()
    application.clipboard().setText("one two three")
    button(window, "Paste").trigger()
    window.go.trigger()
    assert window.original == "one two three"
    window.source.find("two")
    window.go.trigger()
    assert window.original == "two"
    until(lambda: window.stream is None)
    (asked, _) = window.conversation.messages
    assert asked["content"].endswith("\n\ntwo")


def test_stop_ends_it_and_keeps_the_text(make: Any, until: Any) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    window.end.trigger()
    until(lambda: window.stream is None)
    assert window.result.toPlainText() == window.text != ""
    until(lambda: window.service.n_live == 0)


def test_the_slider_acts_on_the_answer_under_way(make: Any, until: Any) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    stream = window.stream
    window.strength.setValue(4)
    assert stream.settings.strength == 1
    assert "1.00" in window.shown.text()
    window.strength.setValue(0)
    assert stream.settings.strength == 0


def test_a_finished_answer_is_written_again_in_another_style(make: Any, until: Any) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    window.end.trigger()
    until(lambda: window.stream is None)

    def is_written_again(*style: object) -> None:
        def asked() -> tuple[object, ...]:
            settings = window.conversation.settings
            return settings.strength, *(each.name for each in settings.prefer)

        until(lambda: asked() == style)
        assert window.text  # the first, until there is another
        window.end.trigger()
        until(lambda: window.stream is None)

    window.strength.setValue(8)
    is_written_again(2, "formal")
    wish(window, "concise").trigger()
    is_written_again(2, "concise", "formal")
    window.own.setText("Write for a child.; Rhyme:0.5")
    window.own.returnPressed.emit()
    is_written_again(2, "concise", "formal", "Write for a child.", "Rhyme")


def test_what_changed_is_shown_and_the_text_is_copied(
    make: Any, until: Any, application: Any, demo: Any
) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    window.compare.trigger()
    assert window.result.toPlainText() == window.text  # it is not written to its end
    window.end.trigger()
    until(lambda: window.stream is None)
    assert window.result.toPlainText() != window.text
    button(window, "Copy").trigger()
    assert application.clipboard().text() == window.text
    window.compare.trigger()
    assert window.result.toPlainText() == window.text
    html = demo.differences("It is <so> good.", "It was <so> good!\nYes")
    assert "It <s>is</s><b>was</b> &lt;so&gt; good<s>.</s><b>!\nYes</b>" in html


def test_another_rewrite_takes_the_place_of_the_first(make: Any, until: Any) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    first = window.stream
    window.go.trigger()
    assert window.stream is not first
    assert window.result.toPlainText() == ""
    until(lambda: first.is_finished and bool(window.text))


def test_another_model_takes_the_place_of_the_first(make: Any, until: Any, tiny: Tiny) -> None:
    window = make()
    window.go.trigger()
    until(lambda: bool(window.text))
    first = window.service
    window.models.addItem("another", str(tiny("qwen3")))
    window.models.activated.emit(window.models.count() - 1)
    assert not window.go.isEnabled()
    until(lambda: window.models.currentData() == str(tiny("qwen3")))
    assert first.is_closed
    assert window.stream is None
    window.go.trigger()
    until(lambda: bool(window.text))


def test_a_file_is_opened_or_not(
    make: Any, until: Any, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = make()
    until(lambda: window.path != "")
    first, chosen = window.service, ""
    monkeypatch.setattr(QtWidgets.QFileDialog, "getOpenFileName", lambda *_: (chosen, ""))
    open_a_file = window.models.count() - 1
    window.models.setCurrentIndex(open_a_file)
    window.models.activated.emit(open_a_file)
    assert window.models.currentData() == window.path == str(tiny("llama"))
    assert window.service is first
    chosen = str(tiny("qwen3"))
    window.models.activated.emit(open_a_file)
    until(lambda: window.path == chosen)
    assert window.models.currentData() == chosen


def test_the_window_turns_while_the_model_is_held_up(
    make: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amulet_gguf.amulet import Amulet

    go_on = threading.Event()
    load = Amulet.load

    def late(*arguments: Any, **options: Any) -> Amulet:
        go_on.wait()
        amulet = load(*arguments, **options)
        step = amulet.engine.step

        def held() -> bool:
            stopped.wait()
            return step()

        amulet.engine.step = held  # type: ignore[method-assign]
        return amulet

    stopped = threading.Event()
    monkeypatch.setattr(Amulet, "load", late)
    window = make()
    ticks: list[None] = []
    timer = QtCore.QTimer(window)
    timer.timeout.connect(lambda: ticks.append(None))
    timer.start(1)
    window.go.trigger()
    window.strength.setValue(8)
    until(lambda: len(ticks) > 20)  # loading
    go_on.set()
    until(lambda: window.service.n_waiting > 0 or window.service.n_live > 0)
    before = len(ticks)
    window.strength.setValue(12)
    until(lambda: len(ticks) > before + 20)  # in the middle of a step
    stopped.set()
    until(lambda: bool(window.text))


def test_errors_are_shown_until_something_works(
    make: Any, until: Any, tiny: Tiny, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing")
    window = make(str(bad))
    until(lambda: "bad.gguf" in window.error.text())
    assert window.error.isVisible()
    window.go.trigger()
    assert "the service is closed" in window.error.text()
    window.models.addItem("good", str(tiny("llama")))
    window.models.activated.emit(window.models.count() - 1)
    until(lambda: window.path != "")
    assert not window.error.isVisible()
    window.own.setText("concice")
    window.go.trigger()
    assert "did you mean 'concise'" in window.error.text()
    assert window.error.isVisible()
    window.own.clear()
    window.go.trigger()
    assert not window.error.isVisible()


@pytest.mark.parametrize("when", ["loading", "writing"])
def test_closing_in_the_middle_leaves_nothing(make: Any, until: Any, when: str) -> None:
    window = make()
    window.go.trigger()
    if when == "writing":
        until(lambda: bool(window.text))
    window.close()
    assert not window.isVisible()
    assert window.service.is_closed
