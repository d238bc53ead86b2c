"""The doctor and shell completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fixture_types import Tiny

from amulet_gguf.checks import diagnosis
from amulet_gguf.cli import main
from amulet_gguf.llama import devices
from amulet_gguf.llama.cache import CACHE_TYPES


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    for name in ("AMULET_MODEL", "AMULET_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.mark.model
def test_a_sound_installation_is_well() -> None:
    result = run("doctor", "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 0
    assert record["ok"]
    status = {check["name"]: check["status"] for check in record["checks"]}
    assert status["exactness"] == status["speed"] == status["models"] == "ok"
    assert all(check["cure"] for check in record["checks"] if check["status"] != "ok")


def without_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_speed", lambda: diagnosis.Check("speed", "ok", ""))


def test_a_broken_configuration_is_a_failure_and_the_rest_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_speed(monkeypatch)
    (home / "config.toml").write_text("nosuch = 1\n")
    result = run("doctor", "--json")
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert "unknown key 'nosuch'" in checks["configuration"]["value"]
    assert checks["exactness"]["status"] == "ok"


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    without_speed(monkeypatch)
    monkeypatch.setattr("amulet_gguf.method.realign.strength", lambda: 5.6)
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAIL  exactness" in result.stdout
    assert "→ report it" in result.stdout


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without_speed(monkeypatch)

    def fail() -> diagnosis.Check:
        raise RuntimeError("boom\nboom")

    monkeypatch.setattr(diagnosis, "_threads", fail)
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAIL  threads" in result.stdout
    assert "RuntimeError: boom boom" in result.stdout
    assert "Traceback" not in result.output


def test_layers_are_counted_as_the_default_profile_loads_them(
    home: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMULET_MODEL", str(tiny("llama")))
    monkeypatch.setattr(devices, "devices", lambda: [devices.Device("Fake0", "", 10**10, 10**10)])
    found = []
    for name in CACHE_TYPES:
        profile = f'[profiles.p]\nn_ctx = 100000\ncache_type = "{name}"\n'
        (home / "config.toml").write_text(f'profile = "p"\n{profile}')
        told = re.search(r"all 3 layers \(([0-9.]+) GB\) of", diagnosis._offload().value)
        assert told
        found.append(float(told[1]))
    assert found == sorted(set(found), reverse=True)


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert f"_AMULET_COMPLETE={shell}_complete" in result.stdout


def completed(line: str) -> list[str]:
    """What the script of bash is told at the end of a line."""
    words = line.split(" ")
    env = {
        **os.environ,
        "_AMULET_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from amulet_gguf.cli import main; main(prog_name='amulet')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stderr == ""
    return [found.partition(",")[2] for found in done.stdout.split()]


def test_commands_models_preferences_and_profiles_complete(home: Path) -> None:
    (home / "config.toml").write_text("[profiles.work]\nseed = 1\n")
    model = home / "models" / "o" / "r" / "Zebra-Q4.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"GGUF")
    assert completed("amulet ch") == ["chat"]
    assert "zebra-q4" in completed("amulet generate -m z")
    assert completed("amulet models show zeb") == ["zebra-q4"]
    assert completed("amulet chat --prefer con") == ["concise"]
    assert completed("amulet chat --profile w") == ["work"]
    assert "qwen2.5-0.5b" in completed("amulet models pull qwen")


def test_completion_survives_a_broken_configuration(home: Path) -> None:
    (home / "config.toml").write_text("nosuch = 1\n")
    assert completed("amulet chat --profile w") == []
    assert completed("amulet ch") == ["chat"]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_bash_accepts_its_script() -> None:
    script = run("completion", "bash").stdout
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
