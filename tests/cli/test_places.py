"""Whatever is found where a file, a folder or a stream should be: one line, at once."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fixture_types import Tiny

from amulet_gguf.cli import main
from amulet_gguf.conversation import sessions
from amulet_gguf.conversation.sessions import Session
from amulet_gguf.home import config
from amulet_gguf.home.files import read_stream, write_atomically
from amulet_gguf.taste.taste import open_taste

pytestmark = pytest.mark.timeout(60)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def make_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for one
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(before)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


PLACES: Mapping[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": make_socket,
    "folder": Path.mkdir,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "huge": make_huge,
}

#: Command lines that read PLACE, and where it is.
READ = [
    ("generate hi -m PLACE", "x.gguf"),
    ("generate hi -m TINY --trust-model --draft-model PLACE", "x.gguf"),
    ("generate hi -m TINY --trust-model --chat-template PLACE", "x"),
    ("generate -f PLACE", "x"),
    ("generate hi -p @PLACE", "x"),
    ("generate hi --schema PLACE", "x"),
    ("generate hi --grammar PLACE", "x"),
    ("batch PLACE -o OUT", "x"),
    ("eval PLACE -o OUT", "x"),
    ("eval QUESTIONS -o HOME/ev -m TINY --trust-model", "ev/ranks1.json"),
    ("taste one --questions PLACE", "x"),
    ("taste one --from HOME/ev", "ev/reading.html"),
    ("taste one --show", "tastes/one.json"),
    ("models show PLACE", "x.gguf"),
    ("models default PLACE", "x.gguf"),
    ("generate hi -m TINY", "config.toml"),
    ("profiles ls", "config.toml"),
    ("profiles add one -p concise", "config.toml"),
    ("profiles edit", "config.toml"),
    ("sessions export one", "sessions/one.json"),
    ("chat --resume one", "sessions/one.json"),
]
#: Those that write it.
WRITTEN = [
    ("explain hi -p concise -n 2 -m TINY --trust-model --html PLACE", "x"),
    ("batch QUESTIONS -n 2 -m TINY --trust-model -o PLACE", "x"),
    ("eval QUESTIONS -n 2 -m TINY --trust-model -o PLACE", "x"),
    ("serve --port 0 -m TINY --log-file PLACE", "x"),
]
#: Those that use the folder of all.
HOME = [
    "sessions ls",
    "sessions export one",
    "sessions rm one",
    "profiles ls",
    "profiles add one -p concise",
    "models default TINY",
    "taste one --show",
    "taste one --forget",
    "generate hi",
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    monkeypatch.setenv("EDITOR", "true")
    for name in ("AMULET_MODEL", "AMULET_PROFILE", "AMULET_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


Run = Callable[..., Result]


@pytest.fixture
def run(home: Path, tiny: Tiny) -> Run:
    """Run a command line in which words in capitals stand for paths."""
    questions = home / "questions.jsonl"
    questions.write_text('{"prompt": "Hi"}\n')
    paths = {"TINY": tiny("llama"), "QUESTIONS": questions, "OUT": home / "out", "HOME": home}

    def typed(line: str, place: str | Path = "", stdin: bytes = b"") -> Result:
        words = line.split()
        for name, path in {**paths, "PLACE": place}.items():
            words = [word.replace(name, str(path)) for word in words]
        return CliRunner().invoke(main, words, input=stdin)

    return typed


def is_refused(result: Result) -> bool:
    """Tell whether the command ended with one line that says why, beside how it is used."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Usage:", "Try ", "This model is asked"))]
    is_one = len(told) == 1 and told[0].startswith("Error: ")
    return is_one and result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)


def check_refused(cases: Mapping[str, Result]) -> None:
    assert {name: result.output for name, result in cases.items() if not is_refused(result)} == {}


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_not_read(kind: str, run: Run, home: Path) -> None:
    cases = {}
    for line, name in READ:
        place = home / name
        place.parent.mkdir(exist_ok=True)
        PLACES[kind](place)
        cases[line] = run(line, place)
        place.rmdir() if place.is_dir() else place.unlink()
    check_refused(cases)


@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "below a file", "long"])
def test_what_cannot_be_written_is_one_line(kind: str, run: Run, home: Path) -> None:
    cases = {}
    for line, name in WRITTEN:
        place = home / name
        if kind in PLACES:
            PLACES[kind](place)
        elif kind == "long":
            place = home / ("x" * 5000)
        else:
            place = home / "questions.jsonl" / "x"
        cases[line] = run(line, place)
        if kind in PLACES:
            place.unlink()
    check_refused(cases)


@pytest.mark.parametrize("kind", ["pipe", "loop", "file", "long", "no user"])
def test_a_home_that_is_none_is_one_line(
    kind: str, run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(home / "home")
    if kind in PLACES:
        PLACES[kind](Path(place))
    elif kind == "file":
        Path(place).touch()
    else:
        place = "~nobody-of-this-name" if kind == "no user" else place * 500
    monkeypatch.setenv("AMULET_HOME", place)
    check_refused({line: run(line) for line in HOME})


def test_without_a_home_and_a_user_the_cure_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("HOME", "AMULET_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    cases = {line: run(line) for line in HOME}
    check_refused(cases)
    assert all("set AMULET_HOME" in result.stderr for result in cases.values())
    assert sorted(os.listdir()) == before  # no folder called "~"
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    for line in ("profiles add one -p concise", "models ls", "sessions ls", "generate hi -n 1 -m TINY"):
        result = run(line)
        assert result.exit_code == 0, result.output


def test_places_of_variables_that_are_none_are_refused_or_passed_over(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, make in PLACES.items():
        make(home / kind)
        monkeypatch.setenv("AMULET_MODEL", str(home / kind))
        assert is_refused(run("generate hi"))
        monkeypatch.delenv("AMULET_MODEL")
        for name in ("OLLAMA_MODELS", "HF_HOME", "HF_HUB_CACHE"):
            monkeypatch.setenv(name, str(home / kind))
        manifest = home / f"of {kind}" / "manifests" / "r" / "library" / "m" / "latest"
        manifest.parent.mkdir(parents=True)
        make(manifest)
        make(home / "models" / f"{kind}.gguf") if (home / "models").is_dir() else None
        assert run("models ls").exit_code == 0
        monkeypatch.setenv("OLLAMA_MODELS", str(home / f"of {kind}"))
        assert run("models ls").exit_code == 0
        (home / "models").mkdir(exist_ok=True)


def test_a_pipe_that_a_shell_passes_is_read(run: Run) -> None:
    outputs = []
    for data in (b"Hi", b"Hi\n"):
        reading, writing = os.pipe()
        os.write(writing, data)
        os.close(writing)
        outputs.append(run("generate -m TINY --trust-model -n 3 -f PLACE", f"/dev/fd/{reading}").output)
        os.close(reading)
    assert outputs[0] == outputs[1] == run("generate Hi -m TINY --trust-model -n 3").output


def test_no_more_is_read_than_was_promised() -> None:
    class Endless:
        n_read = 0

        def read(self, n: int) -> bytes:
            self.n_read += n
            return bytes(n)

    stream = Endless()
    with pytest.raises(OSError, match="more than 3 MB"):
        read_stream(stream, 3 * 2**20)  # type: ignore[arg-type]
    assert stream.n_read == 3 * 2**20 + 1


def test_a_full_disk_is_one_line_and_costs_nothing_else(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config.set_profile("one", {"strength": 2.0})
    monkeypatch.setattr(os, "fsync", full)
    check_refused({
        line: run(line)
        for line in (
            "profiles add two -p concise",
            "models default TINY",
            "batch QUESTIONS -n 2 -m TINY --trust-model -o OUT",
            "eval QUESTIONS -n 2 -m TINY --trust-model -o HOME/ev",
            "explain hi -p concise -n 2 -m TINY --trust-model --html OUT.html",
        )
    })  # fmt: skip
    assert list(config.load_config().profiles) == ["one"]
    spoken = run("chat -m TINY --trust-model -n 3", stdin=b"Hi\nHo\n")
    assert spoken.exit_code == 0
    assert spoken.stderr.count("[not saved: ") == 2


def test_what_is_damaged_is_one_row_and_the_others_work(run: Run, home: Path) -> None:
    sessions.save("good", Session(TURNS))
    os.mkfifo(home / "sessions" / "pipe.json")
    (home / "sessions" / "zero.json").symlink_to("/dev/zero")
    (home / "sessions" / "loop.json").symlink_to("loop.json")
    (home / "sessions" / "torn.json").write_text('{"format": "amulet-se')
    (home / "sessions" / "folder.json").mkdir()
    rows = json.loads(run("sessions ls --json").stdout)
    assert {row["name"] for row in rows if "error" in row} == {"pipe", "zero", "loop", "torn", "folder"}
    assert [row["first"] for row in rows if "error" not in row] == ["Hi"]
    assert len(run("sessions ls").stdout.splitlines()) == 7
    assert run("sessions export good").exit_code == 0
    assert run("sessions rm pipe zero loop torn good").exit_code == 0


def test_a_device_that_a_link_leads_to_is_never_replaced(home: Path) -> None:
    link = home / "link"
    link.symlink_to("/dev/null")
    write_atomically(link, "text")
    sessions.save("one", Session(TURNS))
    model = home / "m.gguf"
    model.write_bytes(b"GGUF")
    (home / "sessions" / "one.kv").symlink_to("/dev/null")
    import numpy as np

    from amulet_gguf.errors import SessionError
    from amulet_gguf.prompts.template import Encoded

    with pytest.raises(SessionError, match="it is not a file"):
        sessions.save_cache("one", model, Encoded("", np.zeros(1, np.int32)), b"data")
    assert Path("/dev/null").is_char_device()


#: Runs commands, each in a process that has the standard streams of this one, but for stderr.
EACH = """
import json, os, sys
from amulet_gguf.cli import main
report = []
for line in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        sys.exit(main(line.split(), prog_name="amulet"))
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    report.append((line, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text))
with open(sys.argv[2], "w") as file:
    json.dump(report, file)
"""


Each = Callable[..., list[tuple[str, int, str]]]


@pytest.fixture
def each(home: Path) -> Each:
    """Run command lines in a shell with redirections; return their codes and what is on stderr."""

    def typed(
        lines: Sequence[str], redirections: str, prefix: Sequence[str] = (), cwd: Path | None = None
    ) -> list[tuple[str, int, str]]:
        report = home / "report"
        command = [*prefix, sys.executable, "-c", EACH, json.dumps(lines), str(report)]
        subprocess.run(["sh", "-c", f'exec "$@" {redirections}', "sh", *command], check=True, cwd=cwd)
        return [tuple(each) for each in json.loads(report.read_text())]

    return typed


LOAD = "-m TINY --trust-model -n 2"
OUTPUT = [
    f"generate hi {LOAD}",
    f"explain hi -p concise {LOAD}",
    "models ls",
    "models ls --json",
    "models show TINY",
    "models show TINY --template",
    "models default",
    "sessions ls",
    "sessions export one",
    "sessions export one --json",
    "profiles ls",
    "profiles show one",
    "taste two --show",
    "doctor",
    "completion bash",
    "--help",
    "generate --help",
    "--version",
]


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_stdout_that_is_closed_or_full_is_one_line(redirection: str, each: Each, tiny: Tiny) -> None:
    sessions.save("one", Session(TURNS))
    config.set_profile("one", {"strength": 2.0})
    lines = [line.replace("TINY", str(tiny("llama"))) for line in OUTPUT]
    for line, code, said in each(lines, redirection):
        told = said.replace("This model is asked by ordinary prompting", "").splitlines()
        assert code == 1, (line, said)
        assert told[-1].startswith("Error: stdout: "), (line, said)
        assert len(told) <= 2, (line, said)


def test_a_stdin_that_is_closed_is_one_line(each: Each, tiny: Tiny) -> None:
    lines = [f"generate {LOAD}", f"generate -f - {LOAD}", f"batch - -o out {LOAD}", f"chat {LOAD}"]
    lines = [line.replace("TINY", str(tiny("llama"))) for line in [*lines, f"taste one {LOAD}"]]
    for line, code, said in each(lines, "<&- >/dev/null"):
        assert code == 1, (line, said)
        assert said.endswith("Error: stdin cannot be read: Bad file descriptor\n"), (line, said)
    assert each(["models ls"], "<&- >/dev/null") == [("models ls", 0, "")]


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="nothing is closed to root"
)
def test_what_must_not_be_read_or_written_is_one_line(each: Each, home: Path, tiny: Tiny) -> None:
    sessions.save("one", Session(TURNS))
    open_taste("one")
    secret = home / "secret"
    secret.write_text("text")
    secret.chmod(0)
    config.set_profile("one", {"strength": 2.0})
    for path in (home / "sessions" / "one.json", home / "config.toml"):
        path.chmod(0)
    (home / "sessions").chmod(0o555)
    lines = [
        line.replace("PLACE", str(secret)).replace("TINY", str(tiny("llama")))
        for line in (
            "generate hi -m PLACE",
            "generate -f PLACE",
            "generate hi -p @PLACE",
            "generate hi --schema PLACE",
            "batch PLACE -o out",
            "profiles ls",
            "profiles add two -p concise",
            "sessions export one",
            "sessions rm one",
            "explain hi -p concise -n 2 -m TINY --trust-model --html PLACE",
        )
    ]
    mortal = ["setpriv", "--inh-caps", "-all", "--bounding-set", "-all"] if os.geteuid() == 0 else []
    for line, code, said in each(lines, "", mortal):
        assert code in (1, 2), (line, said)
        assert said.splitlines()[-1].startswith("Error: "), (line, said)
    (home / "sessions").chmod(0)
    ((_, code, said),) = each(["sessions ls"], "", mortal)
    assert (code, said.count("\n")) == (1, 1)
    (home / "sessions").chmod(0o700)


def test_a_working_folder_that_is_gone_is_none_where_none_is_needed(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = home / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for line in ("models ls", "models default", "sessions ls", "profiles add one -p concise"):
        assert run(line).exit_code == 0
    check_refused({line: run(line) for line in ("generate -f x", "models show x.gguf", "batch x -o y")})


def test_arguments_that_are_no_text_are_taken_or_refused_in_a_line(run: Run) -> None:
    odd = os.fsdecode(b"caf\xe9")
    taken = run(f"generate {odd} --system {odd} -p {odd} --stop {odd} -n 2 -m TINY --trust-model")
    assert taken.exit_code == 0
    check_refused({
        line: run(line)
        for line in (
            f"generate hi -m {odd}",
            f"generate -f {odd}",
            f"generate hi --regex {odd} -m TINY --trust-model",
            f"generate hi --profile {odd}",
            f"sessions export {odd}",
            f"sessions export {'x' * 5000}",
            f"taste {odd} --show",
            f"models show {'x' * 5000}",
            f"models show /{'x' * 5000}.gguf",
            f"generate -f {'x' * 5000}",
        )
    })  # fmt: skip
