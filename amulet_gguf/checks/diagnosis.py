"""Checks of the machine and the installation, for `amulet doctor`."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from amulet_gguf.errors import AmuletError, ConfigError, ModelError
from amulet_gguf.home import paths as home
from amulet_gguf.llama.available import available_bytes

_TOLERANCE: Final = 2e-5  # of log-probabilities in float32, against the game in float64
_SECONDS: Final = 3.0  # of decoding, for the speed


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: "ok", "warning" (it works, but could be better) or "failed".
        value: what was found.
        cure: what to do about it, where it is not well.
    """

    name: str
    status: Literal["ok", "warning", "failed"]
    value: str
    cure: str = ""


def diagnose() -> Iterator[Check]:
    """Yield all checks, the fast ones first. One that fails does not keep the others from running."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("versions", _versions),
        ("processor", _processor),
        ("offload", _offload),
        ("threads", _threads),
        ("memory", _memory),
        ("configuration", _configuration),
        ("data folder", _data_folder),
        ("models", _models),
        ("exactness", _exactness),
        ("speed", _speed),
    ]
    for name, check in checks:
        try:
            yield check()
        except AmuletError as error:  # noqa: PERF203
            yield Check(name, "failed", str(error), "do as it says")
        except Exception as error:  # a doctor who falls ill helps nobody
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Check(
                name, "failed", reason, "install again: pip install --force-reinstall amulet-gguf"
            )


def _versions() -> Check:
    names = ("amulet-gguf", "llama-cpp-python", "numpy", "numba")
    versions = [f"{name} {metadata.version(name)}" for name in names]
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("versions", "ok", ", ".join([*versions, python]))


def _rebuild() -> str:
    """Return how llama.cpp is compiled anew, in the version that is here."""
    release = metadata.version("llama-cpp-python")
    return f"pip install --no-cache-dir --force-reinstall llama-cpp-python=={release}"


def _processor() -> Check:
    from amulet_gguf.llama.model import lib

    info = lib.llama_print_system_info().decode("utf-8", "replace")
    features = [part.split("=")[0].strip().split(":")[-1].strip() for part in info.split("|")]
    features = [each for each in features if each]
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64") and "AVX2" not in features:
        cure = f"build it for this machine: {_rebuild()}"
        return Check("processor", "warning", f"without AVX2: {', '.join(features)}", cure)
    return Check("processor", "ok", ", ".join(features))


def _offload() -> Check:
    from amulet_gguf.home.config import load_config
    from amulet_gguf.llama.devices import devices, offload
    from amulet_gguf.llama.loading import LOADING, Loading
    from amulet_gguf.models.find import find_model

    if found := devices():
        value = ", ".join(map(str, found))
        with contextlib.suppress(ModelError, ConfigError):  # another check says what is wrong there
            path = find_model()
            config = load_config()
            profile = config.values(config.profile) if config.profile else {}
            how = Loading(**{name: each for name, each in profile.items() if name in LOADING})
            fits = offload(path, how.n_ctx, 2, found, how.n_batch, how.cache_type)
            value += f": {fits} of {path.name} go there"
        return Check("offload", "ok", value)
    cure = f"with a GPU: CMAKE_ARGS=-DGGML_CUDA=on {_rebuild()} (or GGML_METAL, GGML_VULKAN)"
    return Check("offload", "warning", "llama.cpp was built for the CPU alone", cure)


def _threads() -> Check:
    from amulet_gguf.llama.threads import default_threads

    threads = default_threads()
    spin = os.environ.get("GOMP_SPINCOUNT", "")
    value = f"{threads} of {os.cpu_count()} logical processors, spin count {spin or 'not set'}"
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active" or spin.lower() == "infinity":
        cure = "unset OMP_WAIT_POLICY and GOMP_SPINCOUNT: two programs at once would block each other"
        return Check("threads", "warning", value, cure)
    return Check("threads", "ok", value)


def _memory() -> Check:
    available, total = available_bytes(), psutil.virtual_memory().total
    value = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if available < 1e9:
        return Check("memory", "warning", value, "close other programs, or use a smaller model")
    return Check("memory", "ok", value)


def _configuration() -> Check:
    from amulet_gguf.home.config import load_config

    config = load_config()
    if config.damaged:
        return Check("configuration", "warning", next(iter(config.damaged.values())), "do as it says")
    value = f"{config.path}, {len(config.profiles)} profiles"
    return Check("configuration", "ok", value if config.path.exists() else f"{config.path} (none yet)")


def _data_folder() -> Check:
    folder = home.data_folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(existing, os.W_OK):
        return Check("data folder", "ok", str(folder))
    cure = "set AMULET_HOME to a folder that can be written"
    return Check("data folder", "failed", f"{folder} cannot be written", cure)


def _models() -> Check:
    from amulet_gguf.models.find import find_model, installed

    models = installed()
    value = f"{len(models)} found, default {find_model()}"
    return Check("models", "ok", value)


def _exactness() -> Check:
    """Play the paper's game for all its rounds in float64, and compare."""
    import numpy as np

    from amulet_gguf.method.realign import combine, strength

    def log_softmax(values: Any) -> Any:
        shifted = values - values.max()
        return shifted - np.log(np.exp(shifted).sum())

    n_vocab = 4096
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(2, n_vocab))).astype(np.float32)
    base, preference = map(log_softmax, logits.astype(np.float64))
    policy, total = preference, 0.0
    for t in range(1, 61):  # alpha = lambda = 2, eta = 10
        total = total + 2 * (policy - base)
        inertia = 1 / (10 * t)
        policy = log_softmax((2 * preference + total / t + policy * inertia) / (2 + inertia))
    s = strength()
    found = log_softmax(combine(logits, (1 - s, s)).astype(np.float64))
    error = float(np.max(np.abs(found - policy) / np.maximum(1, np.abs(policy))))
    value = f"kernel against 60 rounds of the game, V = {n_vocab}: off by {error:.1e}"
    if not error < _TOLERANCE:
        cure = "report it, with the output of amulet doctor --json; empty Numba's cache meanwhile"
        return Check("exactness", "failed", value, cure)
    return Check("exactness", "ok", value)


def _speed() -> Check:
    from amulet_gguf.amulet import Amulet
    from amulet_gguf.methods import describe_auto
    from amulet_gguf.models.find import find_model

    begin = time.perf_counter()
    path: Path = find_model()
    with Amulet.load(path, n_ctx=512) as amulet:
        loaded = time.perf_counter() - begin
        rates = []
        for prefer in (None, "concise"):
            deadline = time.perf_counter() + _SECONDS / 2
            with amulet.stream("Tell a story.", prefer=prefer, max_tokens=200) as stream:
                for _ in stream:
                    if time.perf_counter() > deadline:
                        stream.cancel()
                rates.append(stream.timings.tokens_per_second)
        strength = describe_auto(amulet.model.n_parameters)
    value = (
        f"{path.name}: loaded in {loaded:.1f} s; {rates[0]:.0f} tokens/s plain, {rates[1]:.0f} realigned"
        f"; strength {strength}"
    )
    if rates[0] < 2:
        return Check("speed", "warning", value, "use a smaller model or quantization, or a GPU")
    return Check("speed", "ok", value)
