"""What reaches a terminal, and what a pipe gets, whatever a model, a file or a server wrote."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fixture_types import Tiny

from amulet_gguf.conversation import sessions
from amulet_gguf.conversation.sessions import Session
from amulet_gguf.settings import Settings

OSC = "\x1b]0;owned\x07"
HOSTILE = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F]))
HOSTILE += "".join(map(chr, [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
#: What rich and click write themselves: styles, and where the cursor goes.
OURS = re.compile(r"\x1b\[(?:[0-9;]*m|\?25[lh]|[0-9]*[A-GJK])|\r")

#: Runs commands one after another, as if each had been typed.
RUN = """
import json, sys
from amulet_gguf.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, prog_name="amulet")
    except SystemExit:
        pass
"""
#: Writes the first argument in all the ways that the command has.
WRITE = """
import json, sys
from rich.table import Table
from amulet_gguf.cli.screen import Screen
from amulet_gguf.cli.terminal import Output, echo, prepare_streams
from amulet_gguf.cli.view import AnswerView
prepare_streams()
text = json.loads(sys.argv[1])
print(text)
print(text, file=sys.stderr)
sys.stderr.writelines([text])
for err in (False, True):
    echo(text, err=err)
    echo(text, err=err, fg="red")
    Output(err=err).write_dim(text)
    table = Table(text)
    table.add_row(text)
    Screen(stderr=err).print(text, table)
for unit in (text, f"```\\n{text}\\n```", f"`{text}`"):
    with AnswerView(Screen()) as view:
        view.status = text
        view.write(unit)
        view.draw()
"""


def on_a_terminal(script: str, argument: object) -> str:
    """Run a script on a pseudo-terminal; return what reaches it but for what is the command's own."""
    command = [sys.executable, "-c", script, json.dumps(argument)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "1000"}
    terminal, end = pty.openpty()
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment):
        os.close(end)
        shown = b""
        while True:
            try:
                data = os.read(terminal, 65_536)
            except OSError:  # the other end is gone
                break
            shown += data
    os.close(terminal)
    return OURS.sub("", shown.decode())


def in_a_pipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "amulet_gguf", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")


def obeyed(shown: str) -> set[str]:
    return set(shown) & set(HOSTILE) - {"\n", "\t"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    for name in ("AMULET_MODEL", "AMULET_PROFILE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_no_way_to_write_lets_a_terminal_be_ruled() -> None:
    shown = on_a_terminal(WRITE, f"{HOSTILE}{OSC}\ud800.")
    assert not obeyed(shown)
    assert shown.count("owned") >= 12


@pytest.fixture
def hostile_model(tiny: Tiny, tmp_path: Path) -> Path:
    """A model whose name is a control sequence, and so is its architecture."""
    path = tmp_path / "models" / "o" / "r" / f"x{OSC}y.gguf"
    path.parent.mkdir(parents=True)
    data = tiny("llama").read_bytes()
    assert len(OSC) == len("tiny-llama")
    path.write_bytes(data.replace(b"tiny-llama", OSC.encode()).replace(b"llama", OSC[:5].encode()))
    return path


def said_by(model: Path, tiny: Path) -> Sequence[Sequence[str]]:
    """Command lines that show what a model, a session or a profile holds."""
    written = "".join(f"\\u{ord(each):04x}" for each in OSC + HOSTILE[1:])
    grammar = f'start: "{written}"'
    answer = ["-m", str(tiny), "--trust-model", "--grammar", grammar, "-n", "300", "-c", "1024"]
    return [
        ["sessions", "ls"],
        ["sessions", "export", "one"],
        ["sessions", "export", "one", "--json"],
        ["profiles", "ls"],
        ["profiles", "show", "one"],
        ["models", "ls"],
        ["models", "show", str(model)],
        ["models", "show", str(model), "--json"],
        ["generate", "hi", "-m", str(model)],
        ["generate", "hi", "-m", f"none{OSC}"],
        ["generate", "hi", *answer],
        ["generate", "hi", "--json", *answer],
        ["explain", "hi", "-p", "concise", *answer],
        ["compare", "hi", "-p", "concise", *answer],
        [OSC],
        ["generate", "hi", f"--{OSC}"],
        ["models", "pull", f"{OSC}"],
    ]


def test_what_models_files_and_names_say_is_shown_and_not_obeyed(
    home: Path, hostile_model: Path, tiny: Tiny
) -> None:
    turns = [{"role": role, "content": HOSTILE + OSC} for role in ("user", "assistant")]
    sessions.save("one", Session(turns, Settings(prefer=f"be{OSC}"), f"/models/{OSC}.gguf"))
    (home / "sessions" / "two.json").write_text(json.dumps({"format": f"{OSC}"}))
    prefer = json.dumps(f"be{OSC}")
    (home / "config.toml").write_text(f"[profiles.one]\nprefer = {prefer}\nmodel = {prefer}\n")
    shown = on_a_terminal(RUN, said_by(hostile_model, tiny("llama")))
    assert not obeyed(shown)
    assert shown.count("owned") >= 30
    assert "Traceback" not in shown


def test_results_in_a_pipe_are_as_they_are_and_errors_are_not(home: Path, hostile_model: Path) -> None:
    text = HOSTILE + OSC
    sessions.save("one", Session([{"role": each, "content": text} for each in ("user", "assistant")]))
    exported = subprocess.run(
        [sys.executable, "-m", "amulet_gguf", "sessions", "export", "one"], capture_output=True
    )
    assert exported.stdout.endswith(f"\n## Answer\n\n{text}\n".encode())
    refused = in_a_pipe("generate", "hi", "-m", str(hostile_model))
    assert refused.returncode == 1
    assert not obeyed(refused.stderr)
    assert len(refused.stderr.splitlines()) == 1


def test_a_name_that_is_no_text_comes_out_as_it_went_in(home: Path, tiny: Tiny) -> None:
    path = os.fsencode(home) + b"/caf\xe9.gguf"
    Path(os.fsdecode(path)).write_bytes(tiny("llama").read_bytes())
    command = [sys.executable, "-m", "amulet_gguf", "models", "default"]
    result = subprocess.run(
        command, env={**os.environ, "AMULET_MODEL": os.fsdecode(path)}, capture_output=True
    )
    assert result.stdout == path + b"\n"
    shown = in_a_pipe("models", "show", os.fsdecode(path), "--json")
    assert json.loads(shown.stdout)["path"] == os.fsdecode(path)
