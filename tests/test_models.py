"""Models on the machine: found, named, shown and removed, and refused where they cannot fit."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import Load, MakeContext, Tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES

from amulet_gguf.cli import main
from amulet_gguf.context import Context
from amulet_gguf.errors import EngineError, ModelError, ModelFormatError, ModelNotFoundError
from amulet_gguf.gguf import read_header
from amulet_gguf.memory import cache_bytes, check_fits, estimate, parts
from amulet_gguf.models import find_model, installed


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty machine."""
    for name in ("AMULET_MODEL", "AMULET_PROFILE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "amulet"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setattr("amulet_gguf.models.bundled_model", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: Path, source: Path | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source.read_bytes() if source else b"GGUF")
    return path


def pulled(home: Path, name: str, source: Path | None = None) -> Path:
    return put(home / "amulet" / "models" / name, source)


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


def test_listing_reads_headers_and_not_files(home: Path, tiny: Tiny) -> None:
    for i in range(50):  # 100 GB each, of which there is nothing
        path = pulled(home, f"o/r/model-{i}.gguf", tiny("llama"))
        with path.open("r+b") as file:
            file.truncate(100 * 10**9)
    rows = json.loads(run("ls", "--json").stdout)
    assert len(rows) == 50
    assert {row["architecture"] for row in rows} == {"llama"}


# Memory


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_estimated_cache_is_what_llama_cpp_keeps_of_a_token(
    tiny: Tiny, load: Load, make_context: MakeContext, name: str
) -> None:
    context = make_context(load(name))
    sizes = []
    for _ in range(2):
        context.add(0, np.full(20, 5, np.int32), output=True)
        context.decode()
        sizes.append(len(context.save(0)))
    per_token = (sizes[1] - sizes[0]) / 20
    estimated = cache_bytes(read_header(tiny(name)), 1, 1)
    assert estimated <= per_token <= estimated + 64  # positions and numbers of sequences beside it
    assert load(name).cache_bytes(512, 3) == 3 * 512 * estimated
    memory = estimate(read_header(tiny(name)), 5, 512, 3)
    assert memory.total == 5 + 3 * 512 * estimated + memory.work


def test_what_cannot_fit_names_what_would(tiny: Tiny, load: Load) -> None:
    path = tiny("llama")
    header, size = read_header(path), tiny("llama").stat().st_size
    rest = estimate(header, size, 256, 2)
    fixed = rest.weights + rest.work
    check_fits(path, 1024, 2, available=estimate(header, size, 1024, 2).total)
    with pytest.raises(
        EngineError, match=r"would need .* are free: it would fit with --n-ctx (\d+)"
    ) as caught:
        check_fits(path, 1024, 2, available=estimate(header, size, 1024, 2).total - 1)
    fitting = int(re.search(r"--n-ctx (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert fitting == 768
    check_fits(path, fitting, 2, available=estimate(header, size, 1024, 2).total - 1)
    with pytest.raises(EngineError, match="fewer preferences"):
        check_fits(path, 1024, 2, available=fixed + rest.cache // 2)
    with pytest.raises(EngineError, match="smaller model"):
        check_fits(path, 1024, 2, available=fixed)
    context = Context(load("llama"), n_ctx=fitting, n_sequences=2)
    context.close()


def test_all_parts_of_a_split_model_count(home: Path) -> None:
    names = [f"o/r/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    files = [pulled(home, name) for name in names]
    assert parts(files[0]) == files
    assert parts(files[1]) == [files[1]]
    assert [model.path for model in installed()] == files[:1]
    assert installed()[0].name == "m"


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


def test_equal_names_are_told_apart_by_their_owners(home: Path) -> None:
    one, two = pulled(home, "alice/r/m.gguf"), pulled(home, "bob/r/m.gguf")
    assert [model.name for model in installed()] == ["alice/m", "bob/m"]
    assert (find_model("alice/m"), find_model("BOB")) == (one, two)
    with pytest.raises(ModelNotFoundError, match="could be any of alice/m, bob/m"):
        find_model("m")


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
    monkeypatch.setattr("amulet_gguf.models.bundled_model", lambda: bundled)
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
