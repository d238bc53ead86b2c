"""Models on the machine: found, named, shown and removed, and refused where they cannot fit."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pexpect
import pytest
from click.testing import CliRunner, Result
from fixture_types import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES

from amulet_gguf.cli import main
from amulet_gguf.errors import ModelError, ModelFormatError, ModelNotFoundError
from amulet_gguf.llama.gguf import FILE_TYPES, parts, quantization_in, read_header
from amulet_gguf.models.find import find_model, installed


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty machine."""
    for name in ("AMULET_MODEL", "AMULET_PROFILE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "amulet"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("amulet_gguf.models.find.bundled_model", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, source: Path | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes() if source else b"GGUF")
    return path


def pulled(home: Path, name: str, source: Path | None = None) -> Path:
    return put(home / "amulet" / "models" / name, source)


def amulet(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own, with a stdout that takes UTF-8 only."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "amulet_gguf", *arguments]
    return subprocess.run(command, capture_output=True, env=environment)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["models", *arguments])


# Headers


@pytest.mark.parametrize("name", [*ARCHITECTURES, "bert"])
def test_a_header_says_what_the_reference_reader_says(tiny: Tiny, name: str) -> None:
    path = tiny(name)
    reader = gguf.GGUFReader(path)
    header = read_header(path)
    for key, value in header.metadata.items():
        if not key.endswith(".length"):
            assert reader.fields[key].contents() == value
    texts = {key for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert texts == {key.removesuffix(".length") for key in header.metadata}
    assert header.n_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)


def test_a_brief_header_agrees_and_stops_before_the_vocabulary(tiny: Tiny) -> None:
    whole, brief = read_header(tiny("llama")), read_header(tiny("llama"), brief=True)
    assert brief.metadata.items() <= whole.metadata.items()
    assert brief.n_ctx_train == whole.n_ctx_train > 0
    assert "tokenizer.ggml.tokens.length" not in brief.metadata


@settings(deadline=None)
@given(st.data())
def test_no_damage_does_more_than_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, data: st.DataObject
) -> None:
    blob = bytearray(tiny("llama").read_bytes()[:20_000])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(4, 600))
        blob[place : place + 8] = data.draw(st.binary(min_size=1, max_size=8))
    del blob[data.draw(st.integers(8, len(blob))) :]
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(blob)
    for brief in (True, False):
        with contextlib.suppress(ModelError):
            read_header(path, brief=brief)


def test_a_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    key = b"k"
    for kind, rest in (
        (8, struct.pack("<Q", 2**63)),
        (9, struct.pack("<IQ", 8, 2**62)),
        (9, struct.pack("<IQ", 4, 2**62)),
        (9, struct.pack("<IQ", 9, 1)),
        (99, b"1234"),
    ):
        path = tmp_path / "m.gguf"
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + key
        path.write_bytes(head + struct.pack("<I", kind) + rest)
        with pytest.raises(ModelFormatError, match="damaged or incomplete"):
            read_header(path)


def header_of(*pairs: tuple[str, int, bytes], n_tensors: int = 0) -> bytes:
    """A header of keys, kinds of values and values."""
    keys = [
        struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
        for key, kind, value in pairs
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(keys)) + b"".join(keys)


def text_of(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


@pytest.mark.parametrize(
    ("kind", "value"),
    [(8, struct.pack("<Q", 10**9)), (9, struct.pack("<IQ", 8, 10**8))],
    ids=["text", "texts"],
)
def test_what_fits_into_the_file_is_limited_too(tmp_path: Path, kind: int, value: bytes) -> None:
    path = put(tmp_path / "m.gguf")
    path.write_bytes(header_of(("k", kind, value)))
    with path.open("r+b") as file:
        file.truncate(100 * 10**9)  # where such a length would not be beyond the end
    with pytest.raises(ModelFormatError, match="damaged or incomplete"):
        read_header(path)


def test_a_key_that_looks_like_a_length_is_none(tmp_path: Path) -> None:
    path = put(tmp_path / "m.gguf")
    path.write_bytes(header_of(("tokenizer.ggml.tokens.length", 8, text_of("many"))))
    assert read_header(path).n_vocab == 0


@pytest.mark.parametrize(("number", "name"), [(15, "Q4_K_M"), (1024 + 7, "Q8_0"), (999, "?")])
def test_quantization_is_the_name_of_the_file_type(tmp_path: Path, number: int, name: str) -> None:
    path = put(tmp_path / "m.gguf")
    path.write_bytes(header_of(("general.file_type", 4, struct.pack("<I", number))))
    assert read_header(path).quantization == name


@pytest.mark.parametrize("number", FILE_TYPES)
def test_a_file_name_tells_each_quantization(number: int) -> None:
    name = FILE_TYPES[number]
    assert quantization_in(f"model-7b-it.{name.lower()}") == name
    assert quantization_in(f"{name}-imat") == name
    assert quantization_in("model-7b-q" + "x" * 1000) == quantization_in(f"a{name}b") == "?"


def test_a_list_shows_the_quantization_that_stands_behind_the_vocabulary(home: Path) -> None:
    words = struct.pack("<IQ", 8, 1) + text_of("a")
    late = header_of(
        ("general.architecture", 8, text_of("llama")),
        ("tokenizer.ggml.tokens", 9, words),
        ("general.file_type", 4, struct.pack("<I", 15)),
    )
    pulled(home, "o/r/model.Q4_K_M.gguf").write_bytes(late)
    assert json.loads(run("ls", "--json").stdout)[0]["quantization"] == "Q4_K_M"


def test_listing_reads_headers_and_not_files(home: Path, tiny: Tiny) -> None:
    for i in range(50):  # 100 GB each, of which there is nothing
        path = pulled(home, f"o/r/model-{i}.gguf", tiny("llama"))
        with path.open("r+b") as file:
            file.truncate(100 * 10**9)
    rows = json.loads(run("ls", "--json").stdout)
    assert len(rows) == 50
    assert {row["architecture"] for row in rows} == {"llama"}


# Memory


def test_all_parts_of_a_split_model_count(home: Path) -> None:
    names = [f"o/r/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    files = [pulled(home, name) for name in names]
    assert parts(files[0]) == files
    assert parts(files[1]) == [files[1]]
    assert [model.path for model in installed()] == files[:1]
    assert installed()[0].name == "m"


def test_a_part_that_promises_endless_parts_is_a_file_alone(home: Path) -> None:
    path = pulled(home, "o/r/m-00001-of-99999999999.gguf")
    assert parts(path) == [path]


def test_parameters_of_all_parts_are_counted(home: Path) -> None:
    tensors = [text_of(name) + struct.pack("<IQQIQ", 2, 3, 5, 0, 0) for name in "tuv"]
    count = ("split.count", 2, struct.pack("<H", 3))
    for i in (1, 2):
        path = pulled(home, f"o/r/m[1]-0000{i}-of-00003.gguf")  # not a pattern
        path.write_bytes(header_of(count, n_tensors=i) + b"".join(tensors[i - 1 : 2 * i - 1]))
    record = json.loads(run("show", "m[1]", "--json").stdout)
    assert record["parameters"] == 3 * 15
    assert (record["files"], record["files_missing"]) == (2, 1)
    assert "1 missing" in run("show", "m[1]").stdout


# Finding


def test_models_of_other_programs_are_found_and_named(home: Path, tiny: Tiny) -> None:
    source = tiny("llama")
    digest = "a" * 64
    put(home / f"ollama/blobs/sha256-{digest}", source)
    manifest = {
        "layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}]
    }
    path = home / "ollama/manifests/registry.ollama.ai/library/llama3.2/1b"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))
    for i, broken in enumerate(
        ['{"layers": 3}', "[", '{"layers": [{"mediaType": "image.model", "digest": "../x"}]}']
    ):
        path.with_name(f"broken{i}").write_text(broken)
    put(home / "hf/hub/models--own--repo/snapshots/abc/Hub-Q4_0.gguf", source)
    put(home / ".lmstudio/models/pub/repo/LM-Q8_0.gguf", source)
    put(home / "models/Mine.gguf", source)
    put(home / "models/mmproj-Mine.gguf", source)
    pulled(home, "own/repo/Pulled.gguf", source)
    (home / "models" / "dangling.gguf").symlink_to(home / "nowhere")
    (home / "models" / "loop").symlink_to(home / "models")
    found = {model.name: model.source for model in installed()}
    assert found == {
        "llama3.2:1b": "ollama",
        "hub-q4_0": "hub cache",
        "lm-q8_0": "lm studio",
        "mine": "project",
        "pulled": "pulled",
    }
    assert find_model("llama3.2").name == f"sha256-{digest}"


def test_every_snapshot_of_a_hub_repository_is_listed(home: Path, tiny: Tiny) -> None:
    """What is there only in an older one, too; what is the same in both once."""
    folder = home / "hf/hub/models--own--repo"
    for n, (revision, name, content) in enumerate(
        [
            ("0" * 40, "M-Q4_0.gguf", "one"),
            ("0" * 40, "M-Q8_0.gguf", "two"),
            ("f" * 40, "M-Q4_0.gguf", "one"),
        ]
    ):
        blob = folder / "blobs" / content
        if not blob.exists():
            put(blob, tiny("llama"))
        link = folder / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
        os.utime(link.parent, (n, n))
    assert sorted(model.name for model in installed()) == ["m-q4_0", "m-q8_0"]
    assert find_model("m-q4_0").parent.name == "f" * 40
    assert find_model("m-q8_0").parent.name == "0" * 40


def test_equal_names_are_told_apart_by_their_owners(home: Path) -> None:
    one, two = pulled(home, "alice/r/m.gguf"), pulled(home, "bob/r/m.gguf")
    assert [model.name for model in installed()] == ["alice/m", "bob/m"]
    assert (find_model("alice/m"), find_model("BOB")) == (one, two)
    with pytest.raises(ModelNotFoundError, match="could be any of alice/m, bob/m"):
        find_model("m")


def test_every_model_can_be_named_whatever_the_clashes(home: Path) -> None:
    files = [
        pulled(home, "alice/r/m.gguf"),
        pulled(home, "alice/r2/m.gguf"),
        put(home / "hf/hub/models--alice--r/snapshots/abc/m.gguf"),
        put(home / ".lmstudio/models/alice/r/m.gguf"),
        put(home / "models/alice/m.gguf"),
        put(home / "models/m.gguf"),
    ]
    models = installed()
    assert {model.path for model in models} == set(files)
    assert len({model.name for model in models}) == len(files)
    for model in models:
        assert find_model(model.name) == model.path
    assert find_model("alice/r2") == files[1]


def test_one_file_of_ollama_may_have_two_names(home: Path, tiny: Tiny) -> None:
    digest = "sha256:" + "b" * 64
    blob = put(home / "ollama/blobs" / digest.replace(":", "-"), tiny("llama"))
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]
    for tag in ("1b", "latest"):
        manifest = put(home / "ollama/manifests/registry.ollama.ai/library/llama3.2" / tag)
        manifest.write_text(json.dumps({"layers": layers}))
    assert [model.name for model in installed()] == ["llama3.2:1b", "llama3.2:latest"]
    for name in ("llama3.2:1b", "llama3.2:latest", "llama3.2", "llama"):
        assert find_model(name) == blob


def test_a_bare_name_of_ollama_is_its_latest(home: Path) -> None:
    for letter, tag in (("a", "1b"), ("b", "latest")):
        digest = f"sha256:{letter * 64}"
        put(home / "ollama/blobs" / digest.replace(":", "-"))
        layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]
        manifest = put(home / "ollama/manifests/registry.ollama.ai/library/x" / tag)
        manifest.write_text(json.dumps({"layers": layers}))
    assert find_model("x").name == "sha256-" + "b" * 64


def test_the_name_that_was_pulled_finds_the_file(home: Path) -> None:
    path = pulled(home, "own/repo/file.gguf")
    assert find_model("own/repo/file.gguf") == path
    assert find_model("own/repo/other.gguf") == Path("own/repo/other.gguf")


@pytest.mark.parametrize("name", ["a" * 5000, "~nobodyhere", "~nobodyhere/m.gguf", "a\0b", "/" * 5000])
def test_impossible_names_are_one_line(home: Path, name: str) -> None:
    result = run("show", name)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert isinstance(result.exception, SystemExit)


def test_hostile_file_names_cannot_reach_a_terminal(home: Path) -> None:
    put(home / "models" / "a\x1b[31m.gguf")
    put(home / "models" / "a\u202e.gguf")
    put(home / "models" / os.fsdecode(b"a\xff.gguf"))
    assert all(model.name.isprintable() for model in installed())
    with pytest.raises(ModelNotFoundError) as caught:
        find_model("a")
    assert str(caught.value).isprintable()
    for arguments in (["ls"], ["ls", "--json"]):
        result = amulet("models", *arguments)
        assert result.returncode == 0
        assert result.stderr == b""


def test_names_and_prefixes(home: Path) -> None:
    long, short = pulled(home, "o/r/Qwen-Long.gguf"), pulled(home, "o/r2/Qwen.gguf")
    other = pulled(home, "Qwen/Qwen2.5-0.5B-Instruct-GGUF/x-q4_k_m.gguf")
    assert find_model("qwen") == short
    assert find_model("qwen-l") == long
    assert find_model("qwen2.5-0.5b") == other  # of the catalogue
    assert find_model("Qwen/Qwen2.5-0.5B-Instruct-GGUF") == other
    assert find_model(str(long)) == long
    with pytest.raises(ModelNotFoundError, match=r"did you mean qwen-long"):
        find_model("qven-long")
    with pytest.raises(ModelNotFoundError, match=r"amulet models pull qwen2\.5-3b"):
        find_model("qwen2.5-3b")
    with pytest.raises(ModelNotFoundError, match="amulet models ls"):
        find_model("zzz")


def test_the_order_of_sources(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match="amulet models pull"):
        find_model()
    one, two = pulled(home, "o/r/one.gguf"), pulled(home, "o/r/two.gguf")
    bundled = put(home / "bundled.gguf")
    monkeypatch.setattr("amulet_gguf.models.find.bundled_model", lambda: bundled)
    assert find_model() == bundled
    (home / "amulet" / "config.toml").write_text('model = "one"\n')
    assert find_model() == one
    monkeypatch.setenv("AMULET_MODEL", "two")
    assert find_model() == two
    assert find_model("one") == one


# The command


def test_ls_shows_damage_and_goes_on(home: Path, tiny: Tiny) -> None:
    pulled(home, "o/r/good.gguf", tiny("llama"))
    pulled(home, "o/r/bad\x1b[31m.gguf")
    result = run("ls")
    assert result.exit_code == 0
    assert "good" in result.stdout
    assert "damaged" in result.stdout
    assert "\x1b" not in result.stdout


def test_show_tells_what_the_file_says(home: Path, tiny: Tiny) -> None:
    path = pulled(home, "o/r/m.gguf", tiny("qwen3"))
    record: dict[str, Any] = json.loads(run("show", "m", "--json", "-c", "512").stdout)
    assert record["path"] == str(path)
    assert record["architecture"] == "qwen3"
    assert record["bytes"] == path.stat().st_size
    memory = record["memory"]
    assert memory["without_preference"] < memory["one_preference"] < memory["two_preferences"]
    smaller = json.loads(run("show", "m", "--json", "-c", "512", "--cache-type", "q8_0").stdout)[
        "memory"
    ]
    assert smaller["one_preference"] < memory["one_preference"]
    assert (memory["cache_type"], smaller["cache_type"]) == ("f16", "q8_0")
    assert set(record["strength"]) == {"strength", "fade", "fade_to"}
    assert "with two" in run("show", "m").stdout
    assert run("show", "m", "--template").exit_code == 0
    assert run("show", "nosuch").exit_code == 1


def test_only_what_was_pulled_is_removed(home: Path) -> None:
    files = [pulled(home, f"o/r/m-0000{i}-of-00002.gguf") for i in (1, 2)]
    mine = put(home / "models" / "mine.gguf")
    outside = put(home / "elsewhere" / "x.gguf")
    (home / "amulet" / "models" / "link.gguf").symlink_to(outside)
    assert run("rm", "mine", "-y").exit_code == 1
    assert run("rm", "link", "-y").exit_code == 1
    assert run("rm", "m").exit_code == 2  # nobody to ask
    assert mine.exists()
    assert outside.exists()
    assert all(file.exists() for file in files)
    assert run("rm", "m", "--yes").exit_code == 0
    assert not (home / "amulet" / "models" / "o").exists()


def test_a_link_from_outside_removes_neither_itself_nor_the_model(home: Path) -> None:
    path = pulled(home, "o/r/m.gguf")
    link = home / "elsewhere" / "empty" / "link.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(path)
    (home / "amulet" / "models" / "away").symlink_to(link.parent)
    for name in (link, home / "amulet" / "models" / "away" / "link.gguf"):
        result = run("rm", str(name), "-y")
        assert result.exit_code == 1
        assert "not pulled by amulet" in result.stderr
    assert link.is_symlink()
    assert path.exists()


def test_the_default_keeps_its_whole_name(home: Path, tiny: Tiny) -> None:
    path = pulled(home, "o/r/model-a.gguf", tiny("llama"))
    assert run("default", "mod").exit_code == 0
    pulled(home, "o/r/model-b.gguf", tiny("llama"))
    assert find_model() == path
    other = put(home / "other.gguf", tiny("llama"))
    assert run("default", "other.gguf").stdout.strip() == str(other)


def test_a_default_that_the_environment_hides_is_said_so(
    home: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pulled(home, "o/r/m.gguf", tiny("llama"))
    monkeypatch.setenv("AMULET_MODEL", str(path))
    assert "AMULET_MODEL goes before it" in run("default", "m").stderr


def test_a_template_cannot_command_a_terminal(home: Path) -> None:
    path = pulled(home, "o/r/m.gguf")
    path.write_bytes(header_of(("tokenizer.chat_template", 8, text_of("a\x1b[31mb"))))
    assert run("show", "m", "--template").stdout == "a\x1b[31mb\n"  # as it is, in a pipe
    with pexpect.spawn(
        sys.executable, ["-m", "amulet_gguf", "models", "show", "m", "--template"]
    ) as shell:
        assert "\x1b" not in shell.read().decode()


def test_a_default_must_be_a_model(home: Path, tiny: Tiny) -> None:
    path = pulled(home, "o/r/m.gguf", tiny("llama"))
    pulled(home, "o/r/bad.gguf")
    assert run("default", "nosuch").exit_code == 1
    assert run("default", "bad").exit_code == 1
    assert run("default").exit_code == 1
    assert run("default", "m").stdout == f"{path}\n"
    assert find_model() == path
    assert "m *" in run("ls").stdout
    assert run("default", "--clear").exit_code == 1  # there is no bundled one here
