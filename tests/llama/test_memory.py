"""Estimates of memory are what llama.cpp then takes, and what cannot fit is refused before that."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny_models
from fixture_types import Load, MakeContext, Tiny
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf import amulet
from amulet_gguf.amulet import Amulet
from amulet_gguf.engine import drafts
from amulet_gguf.errors import EngineError
from amulet_gguf.llama import memory
from amulet_gguf.llama.available import available_bytes
from amulet_gguf.llama.cache import CACHE_TYPES
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.gguf import Header
from amulet_gguf.llama.memory import Estimate, cache_bytes, check_fits, compute_bytes, estimate
from amulet_gguf.llama.model import Model, lib

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
MIB = 2**20


def logged(caplog: pytest.LogCaptureFixture, kinds: str) -> float:
    """Return the MiB of buffers that llama.cpp said it made since the last look."""
    found = re.findall(rf"({kinds}) +buffer size = +([\d.]+) MiB", caplog.text)
    caplog.clear()
    return sum(float(size) for _, size in found)


# What llama.cpp takes


@pytest.mark.parametrize("cache_type", CACHE_TYPES)
@pytest.mark.parametrize(("n_ctx", "n_sequences"), [(256, 1), (2048, 1), (4096, 3)])
def test_caches_are_told_exactly_and_working_space_closely(
    any_model: Model, caplog: pytest.LogCaptureFixture, n_ctx: int, n_sequences: int, cache_type: str
) -> None:
    with Model(any_model.path, cache_type=cache_type) as model:
        caplog.set_level(logging.DEBUG, "amulet_gguf.llama.model")
        with Context(model, n_ctx=n_ctx, n_sequences=n_sequences):
            text = caplog.text
    cache = cache_bytes(model.header, n_ctx, n_sequences, cache_type) / MIB
    assert cache == pytest.approx(logged(caplog, "KV|RS"), abs=0.02)  # they are told in hundredths
    caplog.handler.stream.write(text)
    taken = logged(caplog, "compute|output")
    work = compute_bytes(model.header, n_ctx, n_sequences, cache_type=cache_type) / MIB
    assert taken * 0.9 - 0.1 < work < taken * 1.1 + 1


@pytest.mark.parametrize("kind", [2, 7, 15], ids=["Q4_0", "Q8_0", "Q4_K_M"])
def test_what_is_repacked_is_told_exactly(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: int
) -> None:
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = kind
    path = tmp_path / "quantized.gguf"
    done = lib.llama_model_quantize(os.fsencode(tiny("llama")), os.fsencode(path), parameters)
    assert done == 0
    caplog.set_level(logging.DEBUG, "amulet_gguf.llama.model")
    with Model(path):
        repacked = logged(caplog, "CPU_REPACK model|AMX model")
    assert estimate(path, 256, 1).repacked / MIB == pytest.approx(repacked, abs=0.01)


def test_the_engine_has_as_many_rows_of_logits_as_are_counted() -> None:
    assert memory._OUTPUTS == drafts.N_OUTPUTS


@pytest.mark.model
def test_a_process_takes_what_was_estimated(real_model: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "measure_memory.py"), "--child", "--n-ctx", "512"]
    done = subprocess.run([*command, str(real_model)], capture_output=True, text=True, check=True)
    assert estimate(real_model, 512, 2).total == pytest.approx(int(done.stdout), rel=0.1)


# How it grows


@given(
    st.integers(1, 2**24),
    st.integers(1, 2**24),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(["llama", "gemma3", "mamba", "lfm2"]),
)
def test_more_context_and_more_sequences_never_take_less(
    load: Load, n_ctx: int, more: int, n_sequences: int, others: int, name: str
) -> None:
    def total(model: Header, n_ctx: int, n_sequences: int) -> int:
        return cache_bytes(model, n_ctx, n_sequences) + compute_bytes(model, n_ctx, n_sequences)

    model = load(name).header
    least = total(model, n_ctx, n_sequences)
    assert total(model, n_ctx + more, n_sequences) >= least
    assert total(model, n_ctx, n_sequences + others) > least
    assert compute_bytes(model, n_ctx, n_sequences, 512) >= compute_bytes(model, n_ctx, n_sequences, 64)


def test_all_parts_are_counted_once(tiny: Tiny) -> None:
    it = estimate(tiny("llama"), 512, 3)
    assert it.weights == tiny("llama").stat().st_size
    assert it.total == it.weights + it.repacked + it.cache + it.compute + it.program
    assert Estimate(1, 2, 4, 8, memory._PROGRAM).needed == 13  # a copy's original can go


# What does not fit


def needed(path: Path, n_ctx: int, n_sequences: int) -> int:
    return estimate(path, n_ctx, n_sequences).needed


def test_what_cannot_fit_names_what_would(tiny: Tiny, load: Load) -> None:
    path = tiny("llama")
    enough = needed(path, 1024, 2)
    check_fits(path, 1024, 2, available=enough)
    with pytest.raises(
        EngineError, match=r"would need .* are free: it would fit with --n-ctx (\d+)"
    ) as caught:
        check_fits(path, 1024, 2, available=enough - 1)
    fitting = int(re.search(r"--n-ctx (\d+)", str(caught.value))[1])  # type: ignore[index]
    assert fitting == 768
    check_fits(path, fitting, 2, available=enough - 1)
    with pytest.raises(EngineError, match="fewer preferences"):
        check_fits(path, 1024, 2, available=needed(path, 256, 2) - 1)
    with pytest.raises(EngineError, match="smaller model"):
        check_fits(path, 1024, 2, available=needed(path, 256, 1) - 1)
    with Context(load("llama"), n_ctx=fitting, n_sequences=2):
        pass


def test_a_smaller_cache_is_named_where_it_would_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cure(path: Path, available: int) -> str:
        with pytest.raises(EngineError) as caught:
            check_fits(path, 4096, 2, available=available)
        return str(caught.value)

    path = tiny("llama")
    smaller = estimate(path, 4096, 2, cache_type="q8_0").needed
    assert cure(path, smaller).endswith(", or with --cache-type q8_0")
    assert "cache-type" not in cure(path, smaller - 1)
    check_fits(path, 4096, 2, cache_type="q8_0", available=smaller)
    monkeypatch.setitem(tiny_models.SIZES, "h", 16)  # heads that are no whole blocks
    path = tiny_models.build("llama", tmp_path / "small-heads.gguf")
    assert "cache-type" not in cure(path, needed(path, 4096, 2) - 1)


def test_sixteen_million_tokens_are_refused_before_the_model_is_loaded(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 24 * 10**9)
    monkeypatch.setattr(amulet, "Model", None)
    cure = r"with --n-ctx \d{7,8}, or with --cache-type q8_0\Z"
    with pytest.raises(EngineError, match=cure) as caught:
        Amulet.load(tiny("llama"), n_ctx=2**24)
    assert "\n" not in str(caught.value)


def test_a_context_that_grows_is_refused_too(
    load: Load, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama")
    room = cache_bytes(model.header, 512, 8) + compute_bytes(model.header, 512, 8)
    monkeypatch.setattr(memory, "available_bytes", lambda: room)
    make_context(model, 8, n_ctx=512)
    with pytest.raises(EngineError, match=r"memory are free: it would fit with --n-ctx 512"):
        make_context(model, 8, n_ctx=1024)


# What is free


def group(folder: Path, limit: str, used: int, cached: int = 0, *, version: int = 2) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
class TestContainers:
    def test_the_machine_alone(self, root: Path) -> None:
        assert available_bytes(root) == pytest.approx(psutil.virtual_memory().available, rel=0.2)

    @pytest.mark.parametrize("path", ["/", "/docker/1a2b", "/a/b/c"])
    def test_a_containers_limit_counts_wherever_it_is_seen(self, root: Path, path: str) -> None:
        (root / "proc/self/cgroup").write_text(f"0::{path}\n")
        group(root / "sys/fs/cgroup", "1000000", 400_000, 100_000)  # the host's path is not there
        assert available_bytes(root) == 700_000

    def test_the_smallest_of_all_above_counts(self, root: Path) -> None:
        (root / "proc/self/cgroup").write_text("0::/a/b/c\n")
        top = root / "sys/fs/cgroup"
        group(top / "a/b/c", "max", 10)
        group(top / "a/b", "900", 100)
        group(top / "a", "5000", 4500)
        group(top.parent, "1", 1)  # above what is mounted
        assert available_bytes(root) == 500
        group(top / "a/b/c", "60", 10)
        assert available_bytes(root) == 50
        group(top / "a/b/c", "60", 70)
        assert available_bytes(root) == 0

    def test_the_first_version_of_groups(self, root: Path) -> None:
        (root / "proc/self/cgroup").write_text(
            "5:cpu,cpuacct:/x\n4:memory:/docker/ab\n1:name=systemd:/\n"
        )
        top = root / "sys/fs/cgroup/memory"
        group(top, str(2**63 - 4096), 10, version=1)  # its way to say that there is no limit
        assert available_bytes(root) > 10**6
        group(top / "docker/ab", "3000", 2000, 500, version=1)
        assert available_bytes(root) == 1500
