"""Files that end or hang llama.cpp: in the process that tries them, not in this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fixture_types import Tiny

from amulet_gguf.amulet import load_model
from amulet_gguf.errors import ModelFormatError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.models import trial
from amulet_gguf.models.find import bundled_model


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started."""
    found: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        found.append(popen(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def instead(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Run another program where a model would be loaded."""
    monkeypatch.setattr(trial, "_START", f"import os, sys, time; os.write(1, b'began\\n'); {program}")


def with_tokens_alike(model: Path, path: Path) -> Path:
    """Copy a model with two tokens of one spelling, which an assertion of llama.cpp answers."""
    data = model.read_bytes()
    path.write_bytes(data.replace(b"<0xFE>", b"<0xFF>", 1))
    return path


def test_a_file_is_tried_once_whatever_it_is_called(
    tiny: Tiny, tmp_path: Path, started: list[subprocess.Popen[bytes]], home: Path
) -> None:
    with load_model(Loading(model=tiny("llama"))), load_model(Loading(model=tiny("llama"))):
        assert len(started) == 1
    other = shutil.copy(tiny("llama"), tmp_path / "other name.gguf")
    with load_model(Loading(model=other)):
        assert len(started) == 1
    with load_model(Loading(model=tiny("qwen3"))):
        assert len(started) == 2
    assert len(list((home / "tried").iterdir())) == 2


def test_a_file_may_be_trusted(tiny: Tiny, started: list[subprocess.Popen[bytes]], home: Path) -> None:
    with load_model(Loading(model=tiny("llama"), trust_model=True)):
        assert not started
    assert not home.exists()


def test_another_version_of_llama_cpp_tries_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.try_out(tiny("llama"))
    assert trial.is_known(tiny("llama"))
    monkeypatch.setattr("llama_cpp.__version__", "0.0.0")
    assert not trial.is_known(tiny("llama"))


def test_the_bundled_model_and_what_is_trusted_are_not_tried(tiny: Tiny, tmp_path: Path) -> None:
    bundled = bundled_model()
    assert bundled is not None
    assert trial.is_known(bundled)
    assert not trial.is_known(tiny("llama"))
    trial.trust(tiny("llama"))
    assert trial.is_known(tiny("llama"))
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    trial.trust(tmp_path / "none.gguf")


def test_a_file_that_ends_llama_cpp_is_refused_in_a_line(tiny: Tiny, tmp_path: Path, home: Path) -> None:
    path = with_tokens_alike(tiny("llama"), tmp_path / "alike.gguf")
    for _ in range(2):  # nor is it remembered
        with pytest.raises(
            ModelFormatError, match=r"alike\.gguf ends llama\.cpp \(.*GGML_ASSERT"
        ) as error:
            trial.try_out(path)
        assert "\n" not in str(error.value)
    assert not home.exists()


def test_a_file_that_llama_cpp_refuses_is_left_to_who_loads_it(tiny: Tiny, home: Path) -> None:
    trial.try_out(tiny("bert"))
    assert not home.exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("os.kill(os.getpid(), 11)", r"\(SIGSEGV\)"),
        ("os.kill(os.getpid(), 8)", r"\(SIGFPE\)"),
        ("print('refused', flush=True); os._exit(3)", r"\(refused\)"),
        ("os._exit(0)", r"\(exit code 0x0\)"),
        (
            "print('/a/b.cpp:1: \\x1b]0;title\\x07no' + 'x' * 9999, flush=True); os.abort()",
            "\\(b.cpp:1: \ufffd\\]0;title\ufffdnox{99}",
        ),
        ("sys.stdout.write('y\\n' * 10_000_000); os.abort()", r"\(y\)"),
        ("print('works', flush=True); os.abort()", r"\(works\)"),
    ],
)
def test_whatever_ends_the_process_is_told_in_a_line(
    program: str, reason: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead(monkeypatch, program)
    with pytest.raises(ModelFormatError, match=reason) as error:
        trial.try_out(tiny("llama"))
    text = str(error.value).replace(str(tiny("llama")), "")
    assert text.isprintable()
    assert len(text) < 400


def test_a_file_that_comes_to_no_end_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, "print('a' * 100, flush=True); time.sleep(600)")
    monkeypatch.setattr(trial, "_SECONDS", 0.3)
    with pytest.raises(ModelFormatError, match="did not give a token within"):
        trial.try_out(tiny("llama"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux alone")
def test_a_file_cannot_take_all_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(
        monkeypatch,
        "import json; sys.path[:] = json.loads(sys.argv[3]); from amulet_gguf.models import trial; "
        "trial._set_limits(trial.Path(sys.argv[1])); bytearray(64 * 2**30)",
    )
    with pytest.raises(ModelFormatError, match=r"\(MemoryError\)"):
        trial.try_out(tiny("llama"))


def test_a_file_that_could_not_be_tried_is_left_to_who_loads_it(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr(trial, "_START", "raise ImportError('no package')")
    trial.try_out(tiny("llama"))
    monkeypatch.setattr(sys, "executable", str(home / "python"))
    trial.try_out(tiny("llama"))
    assert not home.exists()


def test_an_interrupted_trial_leaves_no_process(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    instead(monkeypatch, "time.sleep(600)")
    with pytest.raises(KeyboardInterrupt):
        trial.try_out(tiny("llama"), progress=interrupt)
    (process,) = started
    assert process.returncode is not None


def test_a_home_that_cannot_be_written_is_no_fault(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "file"))
    trial.try_out(tiny("llama"))
