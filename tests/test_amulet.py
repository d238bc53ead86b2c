"""The Python face, on the bundled model."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fixture_types import Tiny
from literal import ftrl, log_softmax

import amulet_gguf
from amulet_gguf import Amulet, EngineError, PromptError, PromptTooLongError, SettingError, Settings
from amulet_gguf.engine.drafts import RowTimes
from amulet_gguf.llama.context import Context
from amulet_gguf.method import mixture
from amulet_gguf.method.facts import Facts
from amulet_gguf.method.realign import combine_unchecked
from amulet_gguf.preferences import PRESETS
from amulet_gguf.prompts.messages import conversation, with_preference
from amulet_gguf.prompts.template import ChatTemplate

PROMPT = "How do I ask for a raise?"


@pytest.fixture(scope="module")
def amulet(real_model: Path) -> Iterator[Amulet]:
    with Amulet.load(real_model, n_ctx=1024) as loaded:
        yield loaded


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.float32]]:
    """The logits of the branches at each step of what the test generates."""
    logits_of_steps: list[npt.NDArray[np.float32]] = []

    def spy(logits: npt.NDArray[np.float32], *rest: Any) -> int:
        logits_of_steps.append(logits.copy())
        prompted: int = combine_unchecked(logits, *rest)
        return prompted

    monkeypatch.setattr(mixture, "combine_unchecked", spy)
    return logits_of_steps


def tokens_of(answer: amulet_gguf.Answer) -> list[int | None]:
    return [piece.token for piece in answer.pieces]


def test_public_names_are_sorted_and_exist() -> None:
    names = amulet_gguf.__all__
    # Constants, then classes, then functions.
    assert names == sorted(names, key=lambda name: (not name.isupper(), name.islower(), name))
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(amulet_gguf, name) is not None
    with pytest.raises(AttributeError):
        amulet_gguf.nothing_of_that_name  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, amulet_gguf, amulet_gguf.cli;"
        "print(sorted({'llama_cpp', 'numba', 'numpy', 'jinja2', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.model
def test_strength_0_writes_what_the_base_writes(amulet: Amulet) -> None:
    base = amulet.generate(PROMPT, max_tokens=24)
    answer = amulet.generate(PROMPT, prefer="uplifting", strength=0, max_tokens=24)
    assert tokens_of(answer) == tokens_of(base)


@pytest.mark.model
def test_strength_1_writes_what_ordinary_prompting_writes(amulet: Amulet) -> None:
    prompted = amulet.generate(f"{PROMPT}\n\n{PRESETS['uplifting']}", max_tokens=24)
    answer = amulet.generate(PROMPT, prefer="uplifting", strength=1, max_tokens=24)
    assert tokens_of(answer) == tokens_of(prompted)
    assert not any(piece.changed for piece in answer.pieces)


@pytest.mark.model
def test_an_earlier_answer_saves_steps(amulet: Amulet, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(prefer="uplifting", strength=3, fade=0, max_tokens=24)
    steps: list[bool] = []
    step = amulet.engine.step

    def counted() -> bool:
        steps.append(step())
        return steps[-1]

    monkeypatch.setattr(amulet.engine, "step", counted)
    monkeypatch.setattr(amulet.engine, "_row_times", RowTimes())
    monkeypatch.setattr(RowTimes, "told", lambda *_: None)  # of a busy machine: rows would not pay
    first = amulet.generate(PROMPT, settings=settings)
    n_plain = len(steps)
    amulet.generate(PROMPT, settings=settings, draft=first.text)
    assert len(steps) - n_plain < n_plain / 2


@pytest.mark.model
def test_a_preference_changes_the_answer_where_it_says_so(amulet: Amulet) -> None:
    prompted = amulet.generate(PROMPT, prefer="uplifting", strength=1, max_tokens=24)
    answer = amulet.generate(PROMPT, prefer="uplifting", strength=5.65, max_tokens=24)
    pairs = zip(prompted.pieces, answer.pieces, strict=False)
    first = next(i for i, (a, b) in enumerate(pairs) if a.token != b.token)
    # Up to there both read the same tokens, so this is the first that prompting would not write.
    assert [piece.changed for piece in answer.pieces[: first + 1]] == [False] * first + [True]


@pytest.mark.model
def test_tokens_are_those_of_the_papers_game_played_literally(
    amulet: Amulet, seen: list[npt.NDArray[np.float32]]
) -> None:
    """The 60 iterations on the very logits of each step give the very tokens."""
    answer = amulet.generate(PROMPT, settings=Settings.paper("creative"), max_tokens=24)
    assert len(seen) == len(answer.pieces) > 8
    for logits, piece in zip(seen, answer.pieces, strict=True):
        token = int(np.argmax(ftrl(logits[0], logits[1])))
        assert token == piece.token or (piece.token is None and amulet.model.ends_generation(token))


@pytest.mark.model
def test_branches_read_what_contexts_of_their_own_read(
    amulet: Amulet, seen: list[npt.NDArray[np.float32]]
) -> None:
    """Sharing a prefix and decoding branches together changes logits by rounding alone."""
    answer = amulet.generate(PROMPT, prefer="creative", strength=2, protect_facts=False, max_tokens=12)
    template = ChatTemplate(amulet.model)
    messages = conversation(PROMPT, None, None)
    differences = []
    for branch, text in enumerate((None, PRESETS["creative"])):
        pending = template.encode(with_preference(messages, text, "turn")).tokens
        with Context(amulet.model, n_ctx=256, n_sequences=1) as context:
            for logits, piece in zip(seen, answer.pieces, strict=True):
                context.add(0, pending, output=True)
                row = context.decode()[0]
                difference = log_softmax(row) - log_softmax(logits[branch])
                differences.append(np.abs(difference[np.argsort(row)[-50:]]).max())
                pending = np.array([piece.token], np.int32)
    # Batches of another shape sum in another order: up to 0.4 on a quantized model. Reading the wrong
    # branch, or a token too few, moves them by several units.
    assert np.median(differences) < 0.3
    assert max(differences) < 1.0


@pytest.mark.model
def test_same_seed_same_text(amulet: Amulet) -> None:
    def write(seed: int) -> str:
        return amulet.generate(
            PROMPT, prefer=["formal", ("sycophantic", -0.5)], temperature=0.9, seed=seed, max_tokens=24
        ).text

    assert write(1) == write(1)
    assert len({write(seed) for seed in range(4)}) > 1


@pytest.mark.model
def test_pieces_join_to_the_answer_and_carry_its_end(amulet: Amulet) -> None:
    with amulet.stream(PROMPT, prefer="concise", max_tokens=30) as stream:
        pieces = list(stream)
    answer = amulet.generate(PROMPT, prefer="concise", max_tokens=30)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == answer.finish_reason
    assert stream.usage == answer.usage
    assert answer.usage.completion_tokens == sum(piece.token is not None for piece in pieces)
    assert min(answer.timings.queue, answer.timings.prefill, answer.timings.decode) >= 0


@pytest.mark.model
def test_the_prefix_that_branches_share_is_read_once(amulet: Amulet) -> None:
    document = "The tide comes in twice a day, and it goes out again. " * 12
    seen: list[tuple[int, int]] = []
    stream = amulet.stream(
        f"{document}\n\nSummarize this.",
        prefer=["concise", "formal"],
        max_tokens=1,
        on_prefill=lambda done, total: seen.append((done, total)),
    )
    answer = list(stream)
    usage = stream.usage
    assert len(answer) == 1
    assert usage.prompt_tokens < usage.prefill_tokens < usage.prompt_tokens + 60
    done = [read for read, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {usage.prefill_tokens}


@pytest.mark.model
def test_answer_ends_before_a_stop_string(amulet: Amulet) -> None:
    whole = amulet.generate(PROMPT, max_tokens=40).text
    stop = whole[20:24]
    cut = amulet.generate(PROMPT, max_tokens=40, stop=["never written", stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.model
def test_messages_are_a_conversation(amulet: Amulet) -> None:
    one = amulet.generate(messages=[{"role": "user", "content": PROMPT}], max_tokens=8)
    assert one.text == amulet.generate(PROMPT, max_tokens=8).text
    history = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada!"},
        {"role": "user", "content": PROMPT},
    ]
    answer = amulet.generate(messages=history, system="Answer briefly.", max_tokens=8)
    assert answer.text != one.text
    assert answer.usage.prompt_tokens > one.usage.prompt_tokens


@pytest.mark.model
def test_closing_the_stream_frees_its_sequences(amulet: Amulet) -> None:
    stream = amulet.stream(PROMPT, prefer="verbose")
    next(stream)
    assert amulet.engine.n_live == 1
    stream.close()
    assert amulet.engine.n_live == 0
    unstarted = amulet.stream(PROMPT)
    unstarted.close()
    amulet.generate("Hi", max_tokens=1)
    assert amulet.engine.n_live == 0


def test_a_stream_that_is_dropped_is_cancelled(tiny: Tiny) -> None:
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1) as loaded:
        for taken in (0, 1):
            stream = loaded.stream("Hi", max_tokens=100, temperature=1.0, seed=1)
            for _ in range(taken):
                next(stream)
            del stream
            gc.collect()
            loaded.generate("Hi", max_tokens=1)
            assert loaded.engine.n_live == 0


@pytest.mark.model
def test_a_second_thread_is_sent_to_the_service(amulet: Amulet) -> None:
    expected = amulet.generate("Name a color.", max_tokens=4).text
    with amulet.stream("Name a color.", max_tokens=4) as stream:
        next(stream)
        with ThreadPoolExecutor(1) as pool, pytest.raises(EngineError, match="AmuletService"):
            pool.submit(amulet.generate, "Name an animal.", max_tokens=4).result()
        assert stream.answer().text == expected
    assert amulet.engine.n_live == 0


@pytest.mark.model
def test_methods_are_compared_in_one_context(amulet: Amulet) -> None:
    methods = {
        "base": Settings(max_tokens=12),
        "prompting": Settings(prefer=("creative",), strength=1, max_tokens=12),
        "amulet": Settings(prefer=("creative",), strength=5.65, max_tokens=12),
    }
    order: list[str] = []
    answers = amulet.compare(PROMPT, methods, lambda name, piece: order.append(name))
    assert list(answers) == list(methods)
    assert order[:6] == ["base", "prompting", "amulet"] * 2
    assert not any(piece.changed for piece in answers["prompting"].pieces)
    assert any(piece.changed for piece in answers["amulet"].pieces)
    assert amulet.engine.n_live == 0


@pytest.mark.model
def test_unusable_requests_are_refused_before_anything_is_read(amulet: Amulet) -> None:
    with pytest.raises(PromptTooLongError, match="2031 tokens and the context holds 1024") as caught:
        amulet.generate("word " * 2000)
    assert caught.value.n_ctx == 1024
    with pytest.raises(PromptError, match="empty"):
        amulet.generate("  \n")
    with pytest.raises(PromptError, match="either a prompt or messages"):
        amulet.generate()
    with pytest.raises(SettingError, match="strength"):
        amulet.generate(PROMPT, strength=float("nan"))
    with pytest.raises(TypeError, match="strenght"):
        amulet.generate(PROMPT, strenght=1)  # type: ignore[call-arg]
    assert amulet.engine.n_live == 0


@pytest.mark.model
def test_the_paper_preset_writes_128_tokens_at_most(amulet: Amulet) -> None:
    answer = amulet.generate(PROMPT, settings=Settings.paper("verbose"))
    assert answer.finish_reason == "stop" or answer.usage.completion_tokens == 128


@pytest.mark.model
def test_loading_refuses_what_cannot_be(real_model: Path) -> None:
    for wrong in (0, -1, 2**40):
        with pytest.raises(SettingError, match="n_ctx"):
            Amulet.load(real_model, n_ctx=wrong)
    with pytest.raises(amulet_gguf.EngineError, match="GB are free"):
        Amulet.load(real_model, n_ctx=2**24)


@pytest.mark.model
def test_names_and_numbers_are_written_as_prompting_has_them(
    amulet: Amulet, seen: list[npt.NDArray[np.float32]]
) -> None:
    """By the branches' logits: prompting's best where that is of a fact, else what is amplified."""
    answer = amulet.generate(
        "Tell me about Paris, Rome and London.",
        prefer="verbose",
        strength=3,
        fade=0,
        plausibility=0,
        withhold_echo=False,
        repeat_penalty=1,
        max_tokens=40,
    )
    facts, kept, amplified, combined = Facts(), 0, 0, iter(seen)
    for piece in answer.pieces:
        base, prompted = next(combined)
        best = int(prompted.argmax())
        if is_fact := facts.include(amulet.model.token_bytes(best)):
            next(combined)  # once more, with the strength of prompting
        assert piece.token in (None, best if is_fact else int((3 * prompted - 2 * base).argmax()))
        assert piece.changed == (piece.token not in (None, best))
        kept += is_fact
        amplified += piece.changed
        if piece.token is not None:
            facts.push(amulet.model.token_bytes(piece.token))
    assert min(kept, amplified) > 2
    assert next(combined, None) is None
