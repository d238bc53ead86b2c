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
QtTest = pytest.importorskip("PySide6.QtTest", exc_type=ImportError)
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


def click(button: Any) -> None:
    QtTest.QTest.mouseClick(button, QtCore.Qt.MouseButton.LeftButton)


def test_it_is_short() -> None:
    assert len(SCRIPT.read_text("utf-8").splitlines()) < 200


def test_a_rewrite_streams_and_says_how_it_ended(make: Any, until: Any) -> None:
    window = make()
    lengths: list[int] = []
    window.result.textChanged.connect(lambda: lengths.append(len(window.result.toPlainText())))
    click(window.go)
    assert window.end.isEnabled()
    until(lambda: window.stream is None)
    assert len(set(lengths)) > 5
    assert "per second" in window.statusBar().currentMessage()
    assert not window.end.isEnabled()


def test_stop_ends_it_and_keeps_the_text(make: Any, until: Any) -> None:
    window = make()
    click(window.go)
    until(lambda: bool(window.result.toPlainText()))
    click(window.end)
    until(lambda: window.stream is None)
    assert window.result.toPlainText()
    until(lambda: window.service.n_live == 0)
    click(window.end)


def test_the_slider_acts_on_the_answer_under_way(make: Any, until: Any) -> None:
    window = make()
    click(window.go)
    until(lambda: bool(window.result.toPlainText()))
    stream = window.stream
    window.strength.setValue(4)
    assert stream.settings.strength == 1
    assert "ordinary prompting" in window.shown.text()
    window.strength.setValue(0)
    assert stream.settings.strength == 0


def test_another_rewrite_takes_the_place_of_the_first(make: Any, until: Any) -> None:
    window = make()
    click(window.go)
    until(lambda: bool(window.result.toPlainText()))
    first = window.stream
    click(window.go)
    assert window.stream is not first
    assert window.result.toPlainText() == ""
    until(lambda: first.is_finished and bool(window.result.toPlainText()))


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
    click(window.go)
    window.strength.setValue(8)
    until(lambda: len(ticks) > 20)  # loading
    go_on.set()
    until(lambda: window.service.n_waiting > 0 or window.service.n_live > 0)
    before = len(ticks)
    window.strength.setValue(12)
    until(lambda: len(ticks) > before + 20)  # in the middle of a step
    stopped.set()
    until(lambda: bool(window.result.toPlainText()))


def test_errors_are_shown(make: Any, until: Any, tmp_path: Path) -> None:
    window = make()
    window.preference.setCurrentText("concice")
    click(window.go)
    assert "did you mean 'concise'" in window.statusBar().currentMessage()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing")
    window = make(str(bad))
    click(window.go)
    until(lambda: "bad.gguf" in window.statusBar().currentMessage())


@pytest.mark.parametrize("when", ["loading", "writing"])
def test_closing_in_the_middle_leaves_nothing(make: Any, until: Any, when: str) -> None:
    window = make()
    click(window.go)
    if when == "writing":
        until(lambda: bool(window.result.toPlainText()))
    window.close()
    assert not window.isVisible()
    assert window.service.is_closed
