"""Pulling models from a server that behaves like the hub."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import TOKEN, Hub, serving

from amulet_gguf.cli import main
from amulet_gguf.errors import DownloadError, SettingError
from amulet_gguf.models import hub as hub_module
from amulet_gguf.models.catalogue import CATALOGUE
from amulet_gguf.models.hub import Source, parse_source, pull

# More than the client writes at once, so that a break leaves something to go on from.
DATA = np.random.default_rng(0).bytes(24 * 2**20)
SMALL = b"GGUF" + bytes(1000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("AMULET_HOME", str(home))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as hub:
        # The client reads its environment when it is imported.
        import huggingface_hub.constants as constants
        import huggingface_hub.file_download as file_download
        import huggingface_hub.hf_api as hf_api

        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))  # not the developer's
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for module in (file_download, hf_api):
            if hasattr(module, "ENDPOINT"):
                monkeypatch.setattr(module, "ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def pulled(name: str, folder: Path) -> Path:
    return pull(parse_source(name), folder)


def left(folder: Path) -> list[str]:
    """All files under their final names."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in files if path.parts[0] != ".partial")


def test_a_file_arrives_whole_under_its_name(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = DATA
    seen: list[tuple[int, int]] = []
    path = pull(Source("o/r"), tmp_path, lambda _, done, total: seen.append((done, total)))
    assert path == tmp_path / "o" / "r" / "m.gguf"
    assert path.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert seen == sorted(seen)
    assert left(tmp_path) == ["o/r/m.gguf"]
    assert not (tmp_path / ".partial").exists()


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    assert pulled("o/r", tmp_path) == pulled("o/r", tmp_path)
    assert len(hub.asked) == 1


def test_a_broken_connection_is_gone_on_from(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = DATA
    hub.drop_after = [22 * 2**20]
    assert pulled("o/r", tmp_path).read_bytes() == DATA
    (_, first), (_, second) = hub.asked
    assert first is None
    assert second is not None
    assert int(second.removeprefix("bytes=").rstrip("-")) >= 10 * 2**20


def test_a_server_without_ranges_starts_again(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = DATA
    hub.drop_after = [22 * 2**20]
    hub.ignores_ranges = True
    assert pulled("o/r", tmp_path).read_bytes() == DATA


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_pull_that_was_stopped_goes_on(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files["o/r/m.gguf"] = DATA
    hub.pause = 0.1
    code = (
        "import sys; from pathlib import Path; from amulet_gguf.models.hub import *;"
        "print(pull(parse_source('o/r'), Path(sys.argv[1])))"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE) as process:
        partial = tmp_path / ".partial" / hub.digest("o/r/m.gguf")
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size >= 10 * 2**20):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        process.communicate()
    assert left(tmp_path) == []
    hub.pause = 0
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == DATA
    assert hub.asked[-1][1] is not None


def test_a_wrong_digest_leaves_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    hub.lie.add("o/r/m.gguf")
    with pytest.raises(DownloadError, match="sha256"):
        pulled("o/r", tmp_path)
    assert left(tmp_path) == []
    assert not list((tmp_path / ".partial").glob("[!.]*"))


def test_parts_appear_together(hub: Hub, tmp_path: Path) -> None:
    names = [f"o/r/q4/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for i, name in enumerate(names):
        hub.files[name] = SMALL + bytes([i])
    hub.lie.add(names[2])
    with pytest.raises(DownloadError, match="sha256"):
        pulled("o/r", tmp_path)
    assert left(tmp_path) == []
    hub.lie.clear()
    assert pulled("o/r:q4_k_m", tmp_path) == tmp_path / names[0]
    assert left(tmp_path) == names
    assert len(hub.asked) == 6 - 2 + 1 - 1  # the first two were kept, the third was fetched again


def test_a_model_with_a_part_missing_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"o/r/m-0000{i}-of-00003.gguf": SMALL for i in (1, 3)}
    with pytest.raises(DownloadError, match="2 of the 3 parts"):
        pulled("o/r", tmp_path)
    assert hub.asked == []


def test_two_ways_to_split_one_model_are_not_mixed(hub: Hub, tmp_path: Path) -> None:
    names = [f"m-0000{i}-of-0000{n}.gguf" for n in (1, 2) for i in range(1, n + 1)]
    for name in names:
        hub.files[f"o/r/{name}"] = SMALL + name.encode()
    pulled("o/r/m-00002-of-00002.gguf", tmp_path)
    assert left(tmp_path) == ["o/r/m-00001-of-00002.gguf", "o/r/m-00002-of-00002.gguf"]


@pytest.mark.parametrize("size", [0, 1])
def test_another_file_of_that_name_is_replaced(hub: Hub, tmp_path: Path, size: int) -> None:
    """A new version on the hub, or a damaged copy here, may have the same size."""
    hub.files["o/r/m.gguf"] = SMALL
    path = pulled("o/r", tmp_path)
    path.write_bytes(b"x" * (len(SMALL) + size))
    assert pulled("o/r", tmp_path).read_bytes() == SMALL


def test_a_usual_quantization_is_chosen(hub: Hub, tmp_path: Path) -> None:
    for name in ("m-f16", "m-Q8_0", "m-Q4_K_M", "m-Q4_K_S", "mmproj-m-Q4_K_M", "m-IQ4_K_M"):
        hub.files[f"o/r/{name}.gguf"] = SMALL + name.encode()
    assert pulled("o/r", tmp_path).name == "m-Q4_K_M.gguf"
    assert pulled("o/r:Q8_0", tmp_path).name == "m-Q8_0.gguf"
    assert pulled("o/r/m-f16.gguf", tmp_path).name == "m-f16.gguf"
    with pytest.raises(DownloadError, match=r"no Q2_K: it has .*m-Q8_0"):
        pulled("o/r:Q2_K", tmp_path)
    with pytest.raises(DownloadError, match=r"no file nosuch\.gguf: it has"):
        pulled("o/r/nosuch.gguf", tmp_path)


def test_several_that_fit_are_listed(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"o/r/a-Q4_0.gguf": SMALL, "o/r/b-Q4_0.gguf": SMALL}
    with pytest.raises(DownloadError, match=r"a-Q4_0\.gguf, b-Q4_0\.gguf"):
        pulled("o/r", tmp_path)


def test_gated_and_private_need_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"o/gated/m.gguf": SMALL, "o/private/m.gguf": SMALL}
    hub.gated, hub.private = {"o/gated"}, {"o/private"}
    with pytest.raises(DownloadError, match=r"accept its licence at .*o/gated and set HF_TOKEN"):
        pulled("o/gated", tmp_path)
    with pytest.raises(DownloadError, match="set HF_TOKEN"):
        pulled("o/private", tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert pulled("o/gated", tmp_path).exists()
    assert pulled("o/private", tmp_path).exists()


def test_a_wrong_token_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DownloadError, match="check HF_TOKEN"):
        pulled("o/r", tmp_path)


def test_being_offline_on_purpose_is_said(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        pulled("o/r", tmp_path)


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/empty/readme.md"] = b"x"
    with pytest.raises(DownloadError, match="no repository o/nosuch"):
        pulled("o/nosuch", tmp_path)
    with pytest.raises(DownloadError, match="no GGUF file"):
        pulled("o/empty", tmp_path)


def test_names_that_leave_the_folder_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    for name in (
        "../evil.gguf",
        "/evil.gguf",
        "a/../../evil.gguf",
        "a\\evil.gguf",
        "c:evil.gguf",
        "evil\x1b[2J.gguf",
    ):
        hub.files[f"o/r/{name}"] = SMALL
    with pytest.raises(DownloadError, match="no GGUF file"):
        pulled("o/r", tmp_path / "models")
    assert not list(tmp_path.rglob("*evil*"))


def test_a_network_that_is_gone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_repo: str) -> list[Any]:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub_module, "_list", fail)
    with pytest.raises(DownloadError, match="run it again"):
        pulled("o/r", tmp_path)


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub_module, "_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DownloadError, match="run it again"):
            pulled("o/r", tmp_path)


def test_more_than_the_hub_says_does_not_fill_the_disk(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    hub.surplus = DATA
    with pytest.raises(DownloadError, match="longer than the hub says"):
        pulled("o/r", tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= len(SMALL)


def test_a_disk_that_is_too_small_is_said_before(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["o/r/m.gguf"] = DATA
    usage = type("Usage", (), {"free": 70 * 2**20})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"needs 0\.03 GB and 0\.01 GB of disk are free"):
        pulled("o/r", tmp_path)
    assert hub.asked == []


def test_a_disk_that_fills_up_is_said(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files["o/r/m.gguf"] = SMALL

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=r"disk of .* is full: make room and run it again"):
        pulled("o/r", tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (errno.ENOSPC, r"disk of .* is full: make room and run it again"),
        (errno.EFBIG, "cannot be written: File too large"),
        (errno.EROFS, "cannot be written: Read-only"),
    ],
)
def test_a_disk_that_fails_in_the_middle_is_not_called_the_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, complaint: str
) -> None:
    import huggingface_hub.file_download as file_download

    def write_some(_url: str, file: BinaryIO, **_: Any) -> None:
        file.write(SMALL[:100])
        raise OSError(number, os.strerror(number))

    hub.files["o/r/m.gguf"] = SMALL
    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", write_some)
        with pytest.raises(DownloadError, match=complaint):
            pulled("o/r", tmp_path)
    assert left(tmp_path) == []
    assert pulled("o/r", tmp_path).read_bytes() == SMALL
    assert hub.asked == [("o/r/m.gguf", "bytes=100-")]


def test_a_pull_that_ends_leaves_what_another_has_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    other = tmp_path / ".partial" / ("0" * 64)

    def begin_another(*_: object) -> None:
        other.write_bytes(b"half")

    pull(Source("o/r"), tmp_path, begin_another)
    assert [path.name for path in other.parent.iterdir()] == [other.name]


def test_a_second_pull_of_the_same_file_waits_for_none(hub: Hub, tmp_path: Path) -> None:
    from filelock import FileLock

    hub.files["o/r/m.gguf"] = SMALL
    (tmp_path / ".partial").mkdir()
    digest = hashlib.sha256(SMALL).hexdigest()
    lock = FileLock(tmp_path / ".partial" / f".{digest}.lock")
    with lock, pytest.raises(DownloadError, match="another process"):
        pulled("o/r", tmp_path)
    assert pulled("o/r", tmp_path).exists()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("o/r", Source("o/r")),
        ("o/r:Q4_K_M", Source("o/r", quantization="Q4_K_M")),
        ("o/r/f.gguf", Source("o/r", "f.gguf")),
        ("o/r/sub/f.gguf", Source("o/r", "sub/f.gguf")),
        ("https://huggingface.co/o/r", Source("o/r")),
        ("hf.co/o/r:Q8_0", Source("o/r", quantization="Q8_0")),
        ("https://huggingface.co/o/r/", Source("o/r")),
        ("https://huggingface.co/o/r/tree/main", Source("o/r")),
        ("https://huggingface.co/o/r/blob/main/a/f.gguf", Source("o/r", "a/f.gguf")),
        ("https://huggingface.co/o/r/resolve/main/f.gguf?download=true", Source("o/r", "f.gguf")),
    ],
)
def test_sources_are_read(name: str, source: Source) -> None:
    assert parse_source(name) == source


@pytest.mark.parametrize(
    "name", ["", "x", "o/", "/r", "o/r/../x.gguf", "o r/x", "http://evil/o/r", "../o", "o/é"]
)
def test_what_is_no_source_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match="neither"):
        parse_source(name)


def test_the_catalogue_is_of_sources_and_forgives_a_slip() -> None:
    for name, source in CATALOGUE.items():
        assert name == name.lower()
        assert parse_source(name) == parse_source(source)
    with pytest.raises(SettingError, match=r"did you mean 'qwen2\.5-0\.5b'"):
        parse_source("qwen2.5-05b")


def test_what_the_hub_would_never_name_so_is_the_callers_mistake(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="check the name"):
        pulled("o/a--b", tmp_path)


def test_the_command_prints_the_path_alone_on_stdout(hub: Hub) -> None:
    hub.files["o/r/m.gguf"] = SMALL
    first = CliRunner().invoke(main, ["models", "pull", "o/r"])
    again = CliRunner().invoke(main, ["models", "pull", "o/r"])
    assert first.exit_code == again.exit_code == 0
    assert Path(first.stdout.removesuffix("\n")).read_bytes() == SMALL
    assert again.stdout == first.stdout
    assert "fetching m.gguf" in first.stderr
    assert "here already" not in first.stderr
    assert "here already" in again.stderr
    assert "fetching" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "complaint"),
    [
        ([], 2, "qwen2.5-0.5b"),
        (["qwen2.5-05b"], 2, "did you mean 'qwen2.5-0.5b'"),
        (["o/nosuch"], 1, "no repository o/nosuch"),
    ],
)
def test_the_command_fails_in_one_line(
    hub: Hub, arguments: list[str], exit_code: int, complaint: str
) -> None:
    result = CliRunner().invoke(main, ["models", "pull", *arguments])
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == exit_code
    assert last.startswith("Error: ")
    assert complaint in last
    assert result.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_the_bar_shows_a_name_and_does_not_obey_it(hub: Hub, tmp_path: Path) -> None:
    import pexpect

    hub.files["o/r/m[/b].gguf"] = SMALL
    env = {**os.environ, "HF_ENDPOINT": hub.url, "AMULET_HOME": str(tmp_path), "TERM": "xterm"}
    command = ["-m", "amulet_gguf", "models", "pull", "o/r"]
    process: pexpect.spawn[str] = pexpect.spawn(
        sys.executable, command, env=env, dimensions=(24, 200), encoding="utf-8"
    )
    process.expect(pexpect.EOF, timeout=60)
    process.close()
    assert process.exitstatus == 0
    assert process.before is not None
    assert "m[/b].gguf" in process.before
    assert "kB" in process.before or "bytes" in process.before
