"""The configuration and its profiles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_lines import chosen

from amulet_gguf.cli import main
from amulet_gguf.errors import ConfigError
from amulet_gguf.home import config
from amulet_gguf.preferences import as_preferences
from amulet_gguf.settings import Settings

GOOD = """\
# mine
model = "smol"
profile = "work"

[profiles.work]  # for work
prefer = ["concise", "formal:0.5"]
strength = 4.0

[profiles.kid]
prefer = "Write for a child."
"""


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    for name in ("AMULET_MODEL", "AMULET_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "config.toml"


def run(*arguments: str, **more: object) -> Result:
    return CliRunner().invoke(main, arguments, **more)  # type: ignore[arg-type]


def test_no_file_is_an_empty_configuration() -> None:
    found = config.load_config()
    assert (found.model, found.profile, dict(found.profiles)) == (None, None, {})


def test_a_file_is_read(file: Path) -> None:
    file.write_text(GOOD)
    found = config.load_config()
    assert (found.model, found.profile) == ("smol", "work")
    assert found.values("work") == {"prefer": ["concise", "formal:0.5"], "strength": 4.0}


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("modle = 'x'\n", 1, "unknown key 'modle'; did you mean 'model'"),
        ("\n\n[profiles.a]\nstrenght = 3\n", 4, "unknown key 'strenght' in [profiles.a]; did you mean"),
        ("[profiles.a]\nstrength = 'x'\n", 2, "strength must be a number"),
        ("[profiles.a]\nstop = ['''\n[profiles.b]\nstrength\n''']\nstrength = 1e9\n", 6, "strength"),
        ("[profiles.a]\nn_ctx = 1.5\n", 2, "n_ctx must be a whole number"),
        ("[profiles.a]\nprefer = ['consise']\n", 2, "did you mean 'concise'"),
        ("[profiles]\na = { top_p = 7 }\n", 2, "top_p must be"),
        ("profiles.a.seed = -1\n", 1, "seed must be"),
        ("[profiles.a]\npreset = 'papers'\n", 2, "preset must be"),
        ("[profiles.a]\nmodel = 3\n", 2, "model must be a text"),
        ("model = 3\n", 1, "model must be a text"),
        ("profile = 'nosuch'\n", 1, "not among the profiles"),
        ("profiles = 3\n", 1, "tables"),
        ("[profiles]\na = 3\n", 2, "must be a table"),
        ('[profiles."a b"]\n', 1, "not a name"),
        ("model = 'x'\n[profiles.a\n", 2, ""),
        ("model = 'x'\nmodel = 'y'\n", 0, "model"),
        ("[profiles.a]\nstrength = 900\nprefer = ['formal:5']\n", 1, "too large"),
    ],
)
def test_a_mistake_names_file_line_and_key(file: Path, text: str, line: int, complaint: str) -> None:
    file.write_text(text)
    name = "a b" if "a b" in text else "a"
    with pytest.raises(ConfigError) as caught:
        config.load_config().values(name)
    message = str(caught.value)
    assert str(file) in message
    assert complaint in message
    assert "\n" not in message
    if line:
        assert f", line {line}: " in message
    result = run("generate", "hi", "--profile", name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {message}\n"
    assert run("--help").exit_code == 0


@pytest.mark.parametrize("data", [b"\xff", b"# " + b"x" * 2**21])
def test_what_is_no_text_is_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        config.load_config()


def test_edits_keep_comments_and_the_rest(file: Path) -> None:
    file.write_text(GOOD)
    config.set_profile("new", {"strength": 2.0, "prefer": ["formal"]})
    config.set_model("other")
    config.set_default_profile("new")
    text = file.read_text()
    assert "# mine" in text
    assert "[profiles.work]  # for work" in text
    found = config.load_config()
    assert (found.model, found.profile) == ("other", "new")
    assert set(found.profiles) == {"work", "kid", "new"}
    config.remove_profile("new")
    found = config.load_config()
    assert found.profile is None
    assert set(found.profiles) == {"work", "kid"}
    config.set_model(None)
    assert config.load_config().model is None


def test_a_new_key_comes_before_the_tables(file: Path) -> None:
    file.write_text("[profiles.a]\nstrength = 1\n")
    config.set_model('with "quotes"')
    assert config.load_config().model == 'with "quotes"'


def test_an_edit_that_would_be_a_mistake_changes_nothing(file: Path) -> None:
    file.write_text(GOOD)
    call: Callable[[], object]
    for call in (
        lambda: config.set_profile("x", {"strength": "no"}),
        lambda: config.set_profile("a b", {}),
        lambda: config.set_default_profile("nosuch"),
        lambda: config.remove_profile("nosuch"),
        lambda: config.write("model = "),
    ):
        with pytest.raises(ConfigError):
            call()
        assert file.read_text() == GOOD


def test_a_damaged_profile_is_one_row_and_the_others_work(file: Path) -> None:
    damaged = GOOD + "\n[profiles.bad]\nstrength = 'x'\n"
    file.write_text(damaged)
    assert settings_of().strength == 4.0
    *others, row = run("profiles", "ls").stdout.splitlines()
    assert len(others) == 3
    assert row.split()[0] == "bad"
    assert "line 13: strength in [profiles.bad]: strength must be a number" in row
    listed = json.loads(run("profiles", "ls", "--json").stdout)
    assert (list(listed["profiles"]), list(listed["damaged"])) == (["work", "kid"], ["bad"])
    config.set_profile("new", {"seed": 1})
    assert "strength = 'x'" in file.read_text()
    assert "already" in run("profiles", "add", "bad", "-p", "concise").stderr
    with pytest.raises(ConfigError, match=r"profiles\.bad"):
        config.write(damaged)
    assert run("profiles", "rm", "bad").exit_code == 0
    assert not config.load_config().damaged


def test_edits_of_two_processes_are_both_kept(file: Path) -> None:
    code = (
        "import sys; from amulet_gguf.home.config import set_profile\n"
        "for i in range(8): set_profile(f'{sys.argv[1]}{i}', {'seed': i})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(config.load_config().profiles) == 16


# The command


def settings_of(*arguments: str) -> Settings:
    return chosen(*arguments)[0]


def model_of(*arguments: str) -> object:
    return chosen(*arguments)[1].model


def test_a_profile_fills_what_is_not_typed(file: Path) -> None:
    file.write_text(GOOD)
    seen = settings_of("--strength", "2")
    assert seen.strength == 2
    assert seen.prefer == as_preferences(["concise", "formal:0.5"])
    assert settings_of("--profile", "kid").prefer == as_preferences("Write for a child.")
    assert settings_of("--profile", "none").prefer == ()
    assert settings_of("-p", "formal").prefer == as_preferences("formal")


def test_the_environment_names_a_profile(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD)
    monkeypatch.setenv("AMULET_PROFILE", "kid")
    assert settings_of().prefer == as_preferences("Write for a child.")
    assert settings_of("--profile", "work").strength == 4.0


def test_a_model_that_is_said_now_beats_a_default_profile(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text('profile = "a"\n[profiles.a]\nmodel = "mine"\n')
    assert model_of() == "mine"
    assert model_of("-m", "typed") == "typed"
    monkeypatch.setenv("AMULET_MODEL", "environment")
    assert model_of() is None
    assert model_of("--profile", "a") == "mine"


def test_an_unknown_profile_is_one_line(file: Path) -> None:
    file.write_text(GOOD)
    result = run("generate", "hi", "--profile", "wrk")
    assert result.exit_code == 1
    assert "did you mean 'work'?" in result.stderr


def test_profiles_are_added_shown_and_removed(file: Path) -> None:
    assert run("profiles", "add", "w", "-p", "concise", "-s", "3", "-n", "9", "--default").exit_code == 0
    assert json.loads(run("profiles", "show", "w", "--json").stdout) == {
        "prefer": ["concise"],
        "strength": 3.0,
        "max_tokens": 9,
    }
    assert "w *" in run("profiles", "ls").stdout
    assert run("profiles", "default").stdout == "w\n"
    assert run("profiles", "add", "w", "-s", "1").exit_code == 1
    # What the default profile says is not copied into another one.
    assert run("profiles", "add", "v", "--temperature", "1").exit_code == 0
    assert json.loads(run("profiles", "ls", "--json").stdout)["profiles"]["v"] == {"temperature": 1.0}
    assert run("profiles", "add", "u").exit_code == 2
    assert run("profiles", "rm", "w").exit_code == 0
    assert run("profiles", "rm", "w").exit_code == 1
    assert config.load_config().profile is None


def test_the_papers_parameters_become_a_strength(file: Path) -> None:
    assert run("profiles", "add", "w", "--alpha", "2", "--iterations", "0").exit_code == 0
    assert config.load_config().values("w") == {"strength": 1.0}


def test_an_editor_cannot_break_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD)
    script = file.with_name("editor.py")
    script.write_text("import sys; open(sys.argv[1], 'a').write('[profiles.z]\\nnosuch = 1\\n')")
    monkeypatch.setenv("EDITOR", f"{sys.executable} {script}")
    monkeypatch.delenv("VISUAL", raising=False)
    result = run("profiles", "edit")
    assert result.exit_code == 1
    assert "unknown key 'nosuch'" in result.stderr
    assert file.read_text() == GOOD
    assert "nosuch" in file.with_suffix(".draft.toml").read_text()
    script.write_text("import sys; open(sys.argv[1], 'a').write('[profiles.z]\\nseed = 1\\n')")
    assert run("profiles", "edit").exit_code == 0
    assert config.load_config().values("z") == {"seed": 1}


@pytest.mark.parametrize("command", ["batch", "bench", "chat", "compare", "eval", "explain", "generate"])
def test_every_command_that_runs_a_model_takes_a_profile(command: str) -> None:
    result = run(command, "--profile", "nosuch", "x")
    assert result.exit_code == 1
    assert "there is no profile 'nosuch'" in result.stderr
