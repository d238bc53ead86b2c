"""On a GPU, or whatever device llama.cpp was built for, all that is asked of it gives what a CPU gives.

`scripts/check_gpu` builds such a llama.cpp and runs these. Software devices take a second a step and a
minute to begin: the models are tiny, and the answers short.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from fixture_types import MakeContext, Tiny

from amulet_gguf import Amulet
from amulet_gguf.checks.diagnosis import diagnose
from amulet_gguf.errors import ClosedError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.devices import devices, offload
from amulet_gguf.llama.model import Model, can_offload
from amulet_gguf.method.arrays import Float32Array, Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not can_offload(), reason="no device beside the CPU: see scripts/check_gpu"),
]
# Logits spread over some 10 units. A CPU rounds a cache to float16, and products to 8 bits where weights
# are quantized; a GPU rounds elsewhere.
NEAR = 0.1
PROMPT = "Say what the sea is like."


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3", "lfm2", "mamba"])
def pair(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[tuple[Model, Model]]:
    """A tiny model on the CPU, and the same on the device."""
    path = tiny(request.param)
    with Model(path, n_gpu_layers=0) as on_cpu, Model(path) as on_device:
        yield on_cpu, on_device


@pytest.fixture(scope="module")
def on_device(tiny: Tiny) -> Iterator[Model]:
    with Model(tiny("llama")) as model:
        yield model


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    """What llama.cpp said that matches a pattern: its first group, or all of it."""
    caplog.set_level(logging.DEBUG, "amulet_gguf.llama.model")
    return lambda pattern: re.findall(pattern, "\n".join(map(str, caplog.messages)))


def prompts(model: Model) -> list[Tokens]:
    return [
        model.tokenize("The sea is long and near the land"),
        model.tokenize("A word of the old house"),
    ]


def two_rows(context: Context, n_steps: int = 3) -> Float32Array:
    """Read a prompt in each of two sequences, then step both together, (1 + n_steps, 2, V)."""
    first, second = prompts(context.model)
    context.add(0, first, output=True)
    context.add(1, second, output=True)
    rows = [context.decode().copy()]
    for token in first[:n_steps]:
        for sequence in (0, 1):
            context.add(sequence, np.array([token], np.int32), output=True)
        rows.append(context.decode().copy())
    return np.array(rows)


def next_logits(context: Context, sequence: int, token: int) -> Float32Array:
    context.add(sequence, np.array([token], np.int32), output=True)
    logits: Float32Array = context.decode()[0].copy()
    return logits


def near(found: Float32Array, expected: Float32Array, *, most: float = NEAR) -> bool:
    worst = float(np.abs(found - expected).max())
    assert np.isfinite(found).all()
    assert worst < most, f"off by {worst}"
    return True


def test_a_device_says_what_it_is_and_takes_all_layers(
    real_model: Path, said: Callable[[str], list[str]]
) -> None:
    found = devices()
    assert found
    assert all(each.name and each.description and 0 < each.free <= each.total for each in found)
    fits = offload(real_model, 1024, 2, found)
    assert fits.n_layers == fits.of
    with Amulet.load(real_model, n_ctx=1024) as amulet:
        assert amulet.model.share_on_gpu == 1
    assert said(f"offloaded {fits.of}/{fits.of} layers to GPU")
    assert said("Flash Attention enabled")
    taken = {}
    for kind in ("model", "KV", "compute"):
        taken[kind] = sum(map(float, said(rf"{found[0].name} *{kind} buffer size = *([0-9.]+) MiB")[:1]))
        assert taken[kind] > 0
    if len(found) == 1:
        assert 0.7 * fits.n_bytes < sum(taken.values()) * 2**20 <= fits.n_bytes


def test_without_layers_a_device_is_left_alone(tiny: Tiny, said: Callable[[str], list[str]]) -> None:
    with Amulet.load(tiny("llama"), n_ctx=256, n_gpu_layers=0, trust_model=True) as amulet:
        assert amulet.model.share_on_gpu == 0
    assert said("CPU *KV buffer size")
    assert not said(f"{devices()[0].name} *(?:KV|compute) buffer size")


def test_two_rows_are_what_a_cpu_makes_of_them(
    pair: tuple[Model, Model], make_context: MakeContext
) -> None:
    on_cpu, on_device = (two_rows(make_context(model)) for model in pair)
    assert near(on_device, on_cpu)


@pytest.mark.parametrize(("cache_type", "most"), [("q8_0", 4 * NEAR), ("q4_0", 12 * NEAR)])
def test_so_are_those_of_smaller_caches(
    tiny: Tiny, make_context: MakeContext, cache_type: str, most: float
) -> None:
    path = tiny("llama")
    with (
        Model(path, n_gpu_layers=0, cache_type=cache_type) as on_cpu,
        Model(path, cache_type=cache_type) as on_device,
    ):
        contexts = make_context(on_device), make_context(on_cpu)
        assert near(*(two_rows(context) for context in contexts), most=most)
        for context in contexts:  # before the models
            context.close()


@pytest.mark.parametrize("n_layers", [1, 2])
def test_some_layers_on_a_device_and_the_others_on_the_cpu(
    tiny: Tiny, make_context: MakeContext, n_layers: int
) -> None:
    path = tiny("llama")
    with Model(path, n_gpu_layers=0) as on_cpu, Model(path, n_gpu_layers=n_layers) as partly:
        assert 0 < partly.share_on_gpu < 1
        contexts = make_context(partly), make_context(on_cpu)
        assert near(*(two_rows(context) for context in contexts))
        for context in contexts:  # before the models
            context.close()


def test_copies_cuts_and_what_was_saved_go_on_alike(on_device: Model, make_context: MakeContext) -> None:
    context = make_context(on_device, 3)
    tokens, other = prompts(on_device)
    context.add(0, tokens, output=True)
    context.decode()
    context.copy(0, 1)
    expected = next_logits(context, 0, 5)
    assert near(next_logits(context, 1, 5), expected)  # the copy

    context.add(1, other, output=False)
    context.decode()
    context.truncate(1, len(tokens))
    assert near(next_logits(context, 1, 5), expected)  # cut

    context.truncate(0, len(tokens))
    data = context.save(0)
    context.restore(2, data, len(tokens))
    assert near(next_logits(context, 2, 5), expected)  # what was saved

    elsewhere = make_context(on_device, 2)
    elsewhere.restore(1, data, len(tokens))
    assert near(next_logits(elsewhere, 1, 5), expected)  # among fewer sequences


def test_real_weights_give_the_same_best_tokens_but_for_near_ties(
    real_model: Path, make_context: MakeContext
) -> None:
    """A GPU rounds what it multiplies with quantized weights otherwise than a CPU: on an H100 logits are
    off by a tenth of their spread, and what is best there is within 0.5 of the best on the CPU."""
    with Model(real_model, n_gpu_layers=0) as on_cpu, Model(real_model) as on_device:
        contexts = [make_context(model) for model in (on_cpu, on_device)]
        cpu, device = (two_rows(context, 6) for context in contexts)
        for context in contexts:
            context.close()
    assert np.sqrt(((device - cpu) ** 2).mean()) < 0.2 * cpu.std(axis=-1).mean()
    best = np.take_along_axis(cpu, device.argmax(axis=-1)[..., None], axis=-1)
    assert (cpu.max(axis=-1, keepdims=True) - best).max() < 1


def test_an_answer_is_aligned(real_model: Path) -> None:
    with Amulet.load(real_model, n_ctx=256) as amulet:
        answers = [
            amulet.generate(PROMPT, prefer="concise", strength=strength, max_tokens=12)
            for strength in (1, 5)
        ]
    assert answers[0].text != answers[1].text
    assert not any(piece.changed for piece in answers[0].pieces)
    assert any(piece.changed for piece in answers[1].pieces)


@pytest.fixture(scope="module")
def amulet(tiny: Tiny) -> Iterator[Amulet]:
    with Amulet.load(tiny("llama"), n_ctx=512, trust_model=True, draft_model=tiny("llama")) as loaded:
        yield loaded


def test_drafts_change_nothing(amulet: Amulet) -> None:
    plain = amulet.generate(PROMPT, prefer="concise", max_tokens=16, seed=1)
    again = amulet.generate(PROMPT, prefer="concise", max_tokens=16, seed=1, draft=plain.text)
    assert again.text == plain.text != ""


def test_a_grammar_is_obeyed(amulet: Amulet) -> None:
    answer = amulet.generate(PROMPT, prefer="concise", max_tokens=8, regex="wet|dry")
    assert answer.text in ("wet", "dry")


def test_closing_in_the_middle_ends_it(tiny: Tiny) -> None:
    amulet = Amulet.load(tiny("llama"), n_ctx=256, trust_model=True)
    stream = amulet.stream(PROMPT, prefer="concise", max_tokens=50)
    next(stream)
    amulet.close()
    with pytest.raises(ClosedError):
        list(stream)
    amulet.close()
    with Amulet.load(tiny("llama"), n_ctx=256, trust_model=True) as again:
        assert again.generate(PROMPT, max_tokens=2).usage.completion_tokens


def test_the_doctor_names_the_device() -> None:
    check = next(check for check in diagnose() if check.name == "offload")
    assert check.status == "ok"
    assert devices()[0].name in check.value
    assert "layers" in check.value


def test_what_a_step_takes(
    on_device: Model, make_context: MakeContext, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints, and asserts nothing of speed."""
    # In one context, the device's graph would be made anew at each change from one row to two.
    contexts = {n: make_context(on_device, n) for n in (2, 1)}
    two_rows(contexts[2])  # Mesa 22.3's software device dies of two rows if one alone was its first

    def rows(n: int) -> None:
        for sequence in range(n):
            contexts[n].add(sequence, np.array([5], np.int32), output=True)
        contexts[n].decode()

    times: dict[str, list[float]] = {"plain": [], "raw": [], "aligned": []}
    with Amulet.load(on_device.path, n_ctx=256, trust_model=True) as amulet:
        stream = amulet.stream(PROMPT, prefer="concise", strength=3, max_tokens=20, min_tokens=20)
        steps: dict[str, Callable[[], object]] = {
            "plain": lambda: rows(1),
            "raw": lambda: rows(2),
            "aligned": lambda: next(stream),
        }
        for _ in range(8):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                times[name].append(1000 * (time.perf_counter() - begin))
        stream.close()
    plain, raw, aligned = (median(each[2:]) for each in times.values())  # at first, it compiles
    with capsys.disabled():
        print(
            f"\n{devices()[0]}: a plain step {plain:.1f} ms, raw two rows {raw:.1f} ms "
            f"({raw / plain:.2f} × plain), aligned {aligned:.1f} ms ({aligned / plain:.2f} × plain)"
        )
