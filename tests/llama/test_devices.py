"""Layers on devices: as many as fit, fewer where llama.cpp finds no room, and none without a device."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from fixture_types import Tiny
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf import amulet as face
from amulet_gguf.amulet import Amulet
from amulet_gguf.errors import ModelFormatError, NoRoomError
from amulet_gguf.llama.devices import Device, layers_that_fit, offload
from amulet_gguf.llama.model import Model, lib, recent_errors

GB = 10**9
sizes = st.lists(st.integers(1, GB), min_size=1, max_size=40)
memories = st.integers(0, 40 * GB)


def device(free: int) -> Device:
    return Device("Fake0", "a device of the tests", free, max(free, GB))


@given(sizes, st.integers(0, GB), memories)
def test_as_many_layers_as_fit_and_no_more(layers: list[int], work: int, free: int) -> None:
    on = device(free)
    n = layers_that_fit(layers, work, [on])
    assert n == 0 or sum(layers[-n:]) + work <= on.room <= free
    assert n == len(layers) or sum(layers[-n - 1 :]) + work > on.room


@given(sizes, st.integers(0, GB), memories, memories)
def test_more_memory_never_takes_fewer_layers(layers: list[int], work: int, a: int, b: int) -> None:
    less, more = (layers_that_fit(layers, work, [device(free)]) for free in sorted((a, b)))
    assert less <= more


@given(sizes, st.integers(0, GB), st.lists(memories, min_size=2, max_size=4))
def test_no_device_is_given_more_than_its_room(layers: list[int], work: int, free: list[int]) -> None:
    on = [device(each) for each in free]
    n = layers_that_fit(layers, work, on)
    ends = [sum(free[: i + 1]) / sum(free) for i in range(len(on))] if n else []
    taken = [0] * len(on)
    for i in range(n):  # as llama.cpp does
        taken[next(k for k, end in enumerate(ends) if i / n < end)] += layers[len(layers) - n + i]
    assert all(not size or size + work <= each.room for size, each in zip(taken, on, strict=True))


def test_all_fit_or_none(tiny: Tiny) -> None:
    path = tiny("llama")
    all_of_it = offload(path, 256, 2, [device(8 * GB)])
    assert all_of_it.n_layers == all_of_it.of > 1
    assert all_of_it.n_bytes > path.stat().st_size
    for on in ([], [device(0)], [device(1)], [device(0), device(0)]):
        assert offload(path, 256, 2, on).n_layers == 0


def test_a_larger_context_leaves_room_for_fewer_layers(tiny: Tiny) -> None:
    path = tiny("llama")
    on = [device(2 * offload(path, 256, 1, [device(8 * GB)]).n_bytes)]
    counts = [offload(path, n_ctx, n, on).n_layers for n_ctx, n in ((256, 1), (2**14, 1), (2**18, 8))]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 0


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU that says that it has 8 GB, and has not: what llama.cpp is asked for fails for memory, but
    for no layers. Returns the numbers that it was asked for."""
    asked: list[int] = []
    load = lib.llama_model_load_from_file

    def fail(path: bytes, parameters: Any) -> Any:
        asked.append(parameters.n_gpu_layers)
        if parameters.n_gpu_layers == 0:
            return load(path, parameters)
        recent_errors.append("llama_model_load: error loading model: unable to allocate Fake0 buffer")
        return None

    monkeypatch.setattr(lib, "llama_model_load_from_file", fail)
    monkeypatch.setattr(face, "can_offload", lambda: True)
    monkeypatch.setattr(face, "devices", lambda: [device(8 * GB)])
    return asked


def test_fewer_layers_are_tried_where_there_is_no_room(
    on_a_gpu: list[int], tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny("llama")
    of = offload(path, 256, 2, [device(8 * GB)]).n_layers
    with (
        caplog.at_level(logging.WARNING, "amulet_gguf"),
        Amulet.load(path, n_ctx=256, trust_model=True) as amulet,
    ):
        assert amulet.model.n_gpu_layers == 0
        assert amulet.generate("Hello", prefer="concise", max_tokens=2).usage.completion_tokens
    assert on_a_gpu[0] == of
    assert on_a_gpu == sorted(set(on_a_gpu), reverse=True)
    assert len(caplog.records) == len(on_a_gpu) - 1


def test_a_number_of_layers_that_was_chosen_stays(on_a_gpu: list[int], tiny: Tiny) -> None:
    with pytest.raises(NoRoomError, match="n_gpu_layers"):
        Amulet.load(tiny("llama"), n_ctx=256, n_gpu_layers=2, trust_model=True)
    assert on_a_gpu == [2]


def test_a_context_without_room_takes_fewer_layers_too(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, asked = face._context, []

    def fail(model: Model, *rest: Any) -> Any:
        asked.append(model.n_gpu_layers)
        if model.n_gpu_layers > 1:
            raise NoRoomError("no room for the cache")
        return make(model, *rest)

    monkeypatch.setattr(face, "_context", fail)
    monkeypatch.setattr(face, "can_offload", lambda: True)
    monkeypatch.setattr(face, "devices", lambda: [device(8 * GB)])
    with Amulet.load(tiny("llama"), n_ctx=256, trust_model=True) as amulet:
        assert amulet.model.n_gpu_layers == 1
    assert asked[0] > 1


def test_a_file_that_is_damaged_is_still_called_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        recent_errors.append("llama_model_load: error loading model: tensor is not within the file")

    monkeypatch.setattr(lib, "llama_model_load_from_file", fail)
    with pytest.raises(ModelFormatError, match="damaged"):
        Model(tiny("llama"))
