"""The runtime: what would end the process is refused, and sequences keep to themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_types import Load, MakeContext, Tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amulet_gguf.errors import (
    AmuletError,
    ClosedError,
    EngineError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    SettingError,
)
from amulet_gguf.llama import model as llama
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Tokens


def tokens(*ids: int) -> Tokens:
    return np.array(ids, np.int32)


@pytest.mark.parametrize("text", ["Hello there.", "é 🙂 漢字", " a  b\n\n\tc ", "<|im_end|>", ""])
def test_text_survives_tokenization(any_model: Model, text: str) -> None:
    ids = any_model.tokenize(text)
    assert b"".join(any_model.token_bytes(int(token)) for token in ids).decode() == text


def test_the_runtime_leaves_no_file_open_at_exit() -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", "import amulet_gguf.llama.model"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.model
def test_no_token_of_the_bundled_model_is_cut(real_model: Path) -> None:
    with Model(real_model) as model:
        sizes = {len(model.token_bytes(token)) for token in range(model.n_vocab)}
    assert max(sizes) > 32


def test_control_tokens_are_read_only_where_asked(any_model: Model) -> None:
    (end,) = any_model.tokenize("<|im_end|>", special=True)
    assert any_model.ends_generation(int(end))
    assert len(any_model.tokenize("<|im_end|>")) > 1


def test_broken_files_are_refused_in_one_line(tmp_path: Path, tiny: Any) -> None:
    data = tiny("llama").read_bytes()
    broken = {
        "empty": b"",
        "page": b"<html>",
        "version": data[:4] + b"\x63" + data[5:],
        "counts": data[:8] + b"\xff" * 16 + data[24:],
        **{f"cut{size}": data[:size] for size in (4, 23, 100, 5000, len(data) // 2, len(data) - 9)},
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelFormatError) as caught:
            Model(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFormatError, match="embedding model"):
        Model(tiny("bert"))
    for missing in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(ModelError):
            Model(missing)


def test_loading_reports_progress_and_passes_on_an_interrupt(tiny: Any) -> None:
    seen: list[float] = []
    Model(tiny("llama"), progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0

    def interrupt(_fraction: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Model(tiny("llama"), progress=interrupt)


def test_a_copied_sequence_reads_on_as_if_it_had_read_all(
    any_model: Model, make_context: MakeContext
) -> None:
    """Also for recurrent and hybrid models: whole states can be copied, if not parts of them."""
    prefix, tails = any_model.tokenize("The tide comes in twice a day"), tokens(40, 41, 42, 43)
    context = make_context(any_model, 3)
    context.add(0, prefix, output=False)
    context.decode()
    context.copy(0, 1)
    context.copy(1, 2)  # a copy of a copy, before any of it has moved
    shared = []
    for sequence, token in enumerate(tails[:3]):
        context.add(sequence, tokens(int(token)), output=True)
        shared.append(context.decode()[0].copy())
    for token, row in zip(tails, shared, strict=False):
        own = make_context(any_model, 1)
        own.add(0, prefix, output=False)
        own.decode()
        own.add(0, tokens(int(token)), output=True)
        np.testing.assert_array_equal(own.decode()[0], row)


def test_rows_of_one_decode_are_those_of_separate_ones(
    any_model: Model, make_context: MakeContext
) -> None:
    together, apart = make_context(any_model, 2), make_context(any_model, 2)
    for sequence, ids in enumerate((tokens(40, 41, 42), tokens(50, 51))):
        together.add(sequence, ids, output=True)
        apart.add(sequence, ids, output=True)
        row = apart.decode()[0].copy()
        if sequence:
            both = together.decode()
            assert both.shape == (2, any_model.n_vocab)
            np.testing.assert_allclose(both[1], row, atol=0.02)
    assert np.abs(both[0] - both[1]).max() > 0.1


def test_logits_are_a_view(tiny_model: Model, make_context: MakeContext) -> None:
    context = make_context(tiny_model, 1)
    context.add(0, tokens(40), output=True)
    first = context.decode()
    context.add(0, tokens(41), output=True)
    assert np.shares_memory(first, context.decode())
    assert not first.flags.owndata


def test_what_would_end_the_process_is_refused(tiny_model: Model, make_context: MakeContext) -> None:
    context = make_context(tiny_model, 2, n_ctx=256, n_batch=8)
    long = np.full(9, 40, np.int32)
    refused: list[Callable[[], object]] = [
        lambda: context.add(0, long, output=False),
        lambda: context.add(0, long[:0], output=False),
        lambda: context.add(2, tokens(40), output=True),
        lambda: context.add(-1, tokens(40), output=True),
        lambda: context.add(0, tokens(-1), output=True),
        lambda: context.add(0, tokens(tiny_model.n_vocab), output=True),
        lambda: context.copy(0, 2),
        context.decode,
    ]
    for call in refused:
        with pytest.raises(EngineError):
            call()
    context.add(1, tokens(40), output=True)
    for call in (lambda: context.add(0, tokens(40), output=True), lambda: context.copy(0, 1)):
        with pytest.raises(EngineError):
            call()
    assert np.isfinite(context.decode()).all()
    for _ in range(32):
        context.add(0, long[:8], output=False)
        context.decode()
    with pytest.raises(EngineError, match="do not fit"):
        context.add(0, tokens(40), output=True)
    context.free(0)
    context.add(0, tokens(40), output=True)
    assert np.isfinite(context.decode()).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_ctx": 0}, {"n_ctx": 2**31}, {"n_sequences": 0}, {"n_sequences": 257}, {"n_batch": 1},
        {"n_threads": 0}, {"n_threads": 10**6},
    ],
)  # fmt: skip
def test_impossible_contexts_are_refused(tiny_model: Model, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingError):
        Context(tiny_model, **{"n_ctx": 256, "n_sequences": 2, **wrong})


@pytest.mark.parametrize("code", [1, 2, -1, -3])
def test_a_failed_decode_frees_its_sequences_alone(
    tiny_model: Model, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    context = make_context(tiny_model, 2)
    context.add(0, tokens(40, 41), output=False)
    context.decode()
    context.add(1, tokens(42), output=True)
    with monkeypatch.context() as patch:
        patch.setattr(llama.lib, "llama_decode", lambda *_: code)
        with pytest.raises(EngineError):
            context.decode()
    assert (context.length(0), context.length(1)) == (2, 0)
    context.add(1, tokens(42), output=True)
    assert np.isfinite(context.decode()).all()


def test_use_after_close_is_an_error(tiny: Any) -> None:
    model = Model(tiny("llama"))
    context = Context(model, n_ctx=256, n_sequences=1)
    context.add(0, tokens(40), output=True)
    context.close()
    context.close()
    calls: list[Callable[[], object]] = [context.decode, context.clear, lambda: context.free(0)]
    model_calls: list[Callable[[], object]] = [
        lambda: model.tokenize("a"),
        lambda: model.token_bytes(1),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    model.close()
    model.close()
    for call in model_calls:
        with pytest.raises(ClosedError):
            call()


def test_a_cache_too_large_for_the_machine_is_refused(tiny_model: Model) -> None:
    with pytest.raises(EngineError, match="GB of memory are free"):
        Context(tiny_model, n_ctx=2**30, n_sequences=1)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_the_spin_count_is_set_unless_the_user_did(given: dict[str, str], spins: str) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_", "GGML_"))}
    code = (
        "import os, amulet_gguf.llama.model;"
        "print(os.environ.get('GOMP_SPINCOUNT'), os.environ['GGML_NO_BACKTRACE'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [spins, "1"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60))
def test_any_text_survives_tokenization(any_model: Model, text: str) -> None:
    ids = any_model.tokenize(text)
    assert b"".join(any_model.token_bytes(int(token)) for token in ids).decode() == text


def test_lone_surrogates_become_question_marks(any_model: Model) -> None:
    np.testing.assert_array_equal(any_model.tokenize("a\ud800b"), any_model.tokenize("a?b"))


def test_metadata_of_any_length_is_read_whole(any_model: Model) -> None:
    assert any_model.metadata("general.name") == f"tiny-{any_model.metadata('general.architecture')}"
    assert any_model.chat_template is not None
    assert any_model.chat_template.endswith("{% endif %}")
    assert any_model.metadata("no.such.key") is None
    assert any_model.n_ctx_train == 2048


@pytest.mark.parametrize("byte", range(24))
def test_any_flipped_bit_of_the_header_is_refused_or_harmless(
    tmp_path: Path, tiny: Tiny, byte: int
) -> None:
    data = bytearray(tiny("llama").read_bytes())
    for bit in range(8):
        data[byte] ^= 1 << bit
        path = tmp_path / f"{bit}.gguf"
        path.write_bytes(data)
        data[byte] ^= 1 << bit
        try:
            with Model(path) as model:  # version 2 differs from 3 in one bit, and is read alike
                assert (byte, bit) == (4, 0)
                assert model.n_vocab > 0
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["a\nb.gguf", "a\0b.gguf", "x" * 5000])
def test_odd_names_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        Model(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a folder"):
        Model(tmp_path)


PRELUDE = """
import sys
import numpy as np
from amulet_gguf.errors import AmuletError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.model import Model
from amulet_gguf.llama.threads import default_threads
model = Model(sys.argv[1])
context = Context(model, n_ctx=256, n_sequences=2, n_threads=1)
try:
    {}
except AmuletError as error:
    print("refused in", len(str(error).splitlines()), "line")
"""


@pytest.mark.parametrize(
    "call",
    [
        "context.free(2)",
        "context.free(300)",
        "context.free(-1)",
        "model.token_bytes(model.n_vocab)",
        "model.token_bytes(-1)",
        "model.token_text(model.n_vocab)",
        "model.token_text(-1)",
        "context.close(); model.close(); model.bos",
        "context.close(); model.close(); model.eos",
        "context.close(); model.close(); model.adds_bos",
        "context.close(); model.close(); model.ends_generation(0)",
        "context.close(); context.add(0, model.tokenize('a'), output=True)",
    ],
)
def test_what_would_end_the_process_or_read_freed_memory_is_refused(tiny: Tiny, call: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(call), tiny("llama")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "refused in 1 line\n")


def test_a_row_does_not_depend_on_what_its_neighbour_holds(
    any_model: Model, make_context: MakeContext
) -> None:
    rows = []
    for other in (tokens(50, 51, 52, 53), tokens(60, 61, 62, 63)):
        context = make_context(any_model, 2)
        for ids, output in ((tokens(40, 41, 42), False), (tokens(43), True)):
            context.add(0, ids, output=output)
            context.add(1, other[: len(ids)], output=output)
            logits = context.decode()
        rows.append(logits.copy())
    np.testing.assert_array_equal(rows[0][0], rows[1][0])
    assert np.abs(rows[0][1] - rows[1][1]).max() > 0.1


def test_sequences_go_their_own_ways_after_a_copy(any_model: Model, make_context: MakeContext) -> None:
    """Freeing or extending the source changes nothing in the copy."""
    prefix = any_model.tokenize("The tide comes in twice a day")
    rows = []
    for meddle in (False, True):
        context = make_context(any_model, 3)
        context.add(0, prefix, output=False)
        context.decode()
        context.copy(0, 1)
        if meddle:
            context.free(0)
        context.add(0, tokens(50), output=True)
        context.decode()
        context.add(1, tokens(60), output=True)
        rows.append(context.decode()[0].copy())
        assert context.length(1) == len(prefix) + 1
    np.testing.assert_array_equal(*rows)


def test_freeing_makes_a_sequence_as_new(any_model: Model, make_context: MakeContext) -> None:
    rows = []
    for used in (False, True):
        context = make_context(any_model, 2)
        if used:
            context.add(0, tokens(*range(40, 90)), output=False)
            context.decode()
            context.free(0)
        assert context.length(0) == 0
        context.add(0, tokens(40, 41), output=True)
        rows.append(context.decode()[0].copy())
    np.testing.assert_array_equal(*rows)


def test_clearing_forgets_rows_that_wait(any_model: Model, make_context: MakeContext) -> None:
    context = make_context(any_model, 2)
    context.add(0, tokens(40), output=True)
    context.clear()
    assert (context.room, context.length(0)) == (context.n_batch, 0)
    with pytest.raises(EngineError, match="no rows"):
        context.decode()


def test_a_batch_without_outputs_gives_no_rows(any_model: Model, make_context: MakeContext) -> None:
    context = make_context(any_model, 2)
    context.add(1, tokens(40, 41), output=False)
    assert context.decode().shape == (0, any_model.n_vocab)


@pytest.mark.parametrize("asked", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_each_sequence_holds_what_was_asked_rounded_up(
    load: Load, make_context: MakeContext, asked: int, n_sequences: int
) -> None:
    context = make_context(load("llama"), n_sequences, n_ctx=asked)
    assert context.n_ctx == -(-asked // 256) * 256
    last = n_sequences - 1
    while context.length(last) < context.n_ctx:
        n = min(context.room, context.n_ctx - context.length(last))
        context.add(last, np.full(n, 40, np.int32), output=True)
        assert np.isfinite(context.decode()).all()


@pytest.mark.parametrize("n_batch", [2**32, 2**32 + 2, 2**64 + 2])
def test_a_batch_too_large_for_its_field_is_refused(tiny_model: Model, n_batch: int) -> None:
    with pytest.raises(SettingError):
        Context(tiny_model, n_ctx=256, n_sequences=2, n_batch=n_batch, n_threads=1).close()


def test_rows_waiting_when_a_sequence_is_freed_do_not_come_back(
    any_model: Model, make_context: MakeContext
) -> None:
    """A generation cancelled between `add` and `decode`: its sequence must be usable afterwards."""
    context = make_context(any_model, 2)
    context.add(0, tokens(40, 41, 42), output=True)
    context.decode()
    context.add(0, tokens(43), output=True)
    try:
        context.free(0)
    except EngineError:
        context.clear()
    else:
        context.decode()
    context.add(0, tokens(50), output=True)
    assert np.isfinite(context.decode()).all()
    assert context.length(0) == 1


def test_messages_of_llama_cpp_are_given_in_one_line(
    tiny_model: Model, make_context: MakeContext
) -> None:
    context = make_context(tiny_model, 1)
    context.add(0, tokens(40, 41, 42), output=True)
    context.decode()
    context._lengths[0] = 0  # as any disagreement about positions
    context.add(0, tokens(43), output=True)
    with pytest.raises(EngineError) as caught:
        context.decode()
    assert "\n" not in str(caught.value)
    context.add(0, tokens(40), output=True)
    assert np.isfinite(context.decode()).all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("no")])
def test_loading_can_go_on_after_an_error_in_progress(
    tiny: Tiny, error: BaseException | type[BaseException]
) -> None:
    calls: list[float] = []

    def fail(fraction: float) -> None:
        calls.append(fraction)
        raise error

    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind):
        Model(tiny("llama"), progress=fail)
    assert len(calls) == 1
    with Model(tiny("llama")) as model:
        assert model.n_vocab > 0


def test_an_unreadable_file_is_refused_in_one_line(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that a mode would not do."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("amulet_gguf.llama.files.open_without_waiting", refuse)
    with pytest.raises(ModelError, match="Permission denied") as caught:
        Model(tiny("llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["context first", "model first"])
def test_model_and_context_close_in_any_order(tiny: Tiny, where: str) -> None:
    model = Model(tiny("llama"))
    context = Context(model, n_ctx=256, n_sequences=1, n_threads=1)
    closing: list[Callable[[], None]] = [context.close, model.close]
    for close in closing if where == "context first" else closing[::-1]:
        close()
    with pytest.raises(AmuletError):
        context.decode()
