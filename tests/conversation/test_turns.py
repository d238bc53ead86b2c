"""A conversation in Python: what is read again, and what its explanations say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from fixture_types import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from amulet_gguf.amulet import Amulet
from amulet_gguf.cli import explained, main
from amulet_gguf.conversation import turns
from amulet_gguf.conversation.turns import Conversation
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import PromptError, PromptTooLongError, SettingError
from amulet_gguf.method.arrays import Float32Array
from amulet_gguf.method.explanation import explain, kl, largest
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.template import ChatTemplate, Encoded
from amulet_gguf.settings import Placement, Settings
from amulet_gguf.stream import Stream

# Explanations of single tokens

rows = arrays.arrays(np.float32, 50, elements=st.floats(-30, 30, width=32))


def probabilities(row: Float32Array) -> np.ndarray:
    exact = np.exp(row.astype(np.float64) - row.max())
    return np.asarray(exact / exact.sum())


@settings(deadline=None)
@given(rows, rows, st.sets(st.integers(0, 49), max_size=40))
def test_the_divergence_is_that_of_float64(
    row: Float32Array, plain: Float32Array, masked: set[int]
) -> None:
    row[list(masked)] = -np.inf
    q, p = probabilities(row), probabilities(plain)
    used = q > 1e-30
    exact = float((q[used] * np.log(q[used] / p[used])).sum())
    log_row = float(np.log(np.exp(row.astype(np.float64) - row.max()).sum()) + row.max())
    log_plain = float(np.log(np.exp(plain.astype(np.float64) - plain.max()).sum()) + plain.max())
    assert kl(row, log_row, plain, log_plain) == pytest.approx(max(0, exact), rel=1e-3, abs=1e-3)


@settings(deadline=None)
@given(rows, st.integers(1, 50))
def test_the_largest_are_those_of_a_stable_sort(row: Float32Array, k: int) -> None:
    best = np.empty(k, np.int32)
    largest(row, best)
    assert best.tolist() == np.argsort(-row, kind="stable")[:k].tolist()


def test_an_explanation_of_four_tokens() -> None:
    plain = np.log(np.array([0.7, 0.1, 0.1, 0.1], np.float32))
    row = np.log(np.array([0.1, 0.7, 0.1, 0.1], np.float32))
    row[3] = -np.inf
    logits = np.stack([plain + 3, plain])  # the second is the reference
    why = explain(logits, np.array([0.0, 1.0]), row, 1, lambda token: b"abcd"[token : token + 1], 2)
    q = np.array([0.1, 0.7, 0.1]) / 0.9
    assert why.divergence == pytest.approx((q * np.log(q / [0.7, 0.1, 0.1])).sum(), abs=1e-3)
    assert (why.probability, why.prompted) == pytest.approx((0.7 / 0.9, 0.1), abs=1e-3)
    assert [each.text for each in why.alternatives] == ["b", "a"]


# Conversations


@pytest.fixture(scope="module")
def amulet(real_model: Path) -> Iterator[Amulet]:
    with Amulet.load(real_model, n_ctx=768, n_sequences=3) as amulet:
        yield amulet


LONG = "The people of the old house by the sea were learning to read and to write. " * 12


def ask(conversation: Conversation[Stream], text: str, **options: object) -> tuple[str, int]:
    """Return an answer and how many tokens were read for it."""
    turn = conversation.ask(text, max_tokens=8, **options)  # type: ignore[arg-type]
    for _ in turn:
        pass
    return turn.text, turn.usage.prefill_tokens


def test_what_was_left_open_stays_open(tiny: Tiny) -> None:
    """What is resolved for an answer is not kept: an auto strength, a contrast without a preference."""
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1, n_sequences=3) as loaded:
        conversation = Conversation(loaded, Settings(avoid="verbose", max_tokens=8, date="2026-01-31"))
        asked = conversation.settings
        for _ in range(2):
            ask(conversation, "a")
            assert conversation.settings == asked
        with conversation.ask("b") as turn:
            turn.adjust(strength=3, weights=[-2])
        assert conversation.settings == asked.replace(strength=3)


def test_a_conversation_keeps_the_day_on_which_it_began(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Day(date):
        today_is = "2026-01-31"

        @classmethod
        def today(cls) -> Day:
            return cls.fromisoformat(cls.today_is)

    monkeypatch.setattr(turns, "date", Day)
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1) as loaded:
        conversation = Conversation(loaded, Settings(max_tokens=3))
        ask(conversation, "a")
        monkeypatch.setattr(Day, "today_is", "2026-02-01")
        ask(conversation, "b")
        assert conversation.settings.date == "2026-01-31"
        conversation.clear()
        ask(conversation, "a")
        assert conversation.settings.date == "2026-02-01"
        conversation.clear()
        ask(conversation, "a", date="2020-05-05")
        assert conversation.settings.date == "2020-05-05"


@pytest.mark.model
def test_a_turn_reads_what_is_new_whatever_is_preferred(amulet: Amulet) -> None:
    conversation = Conversation(amulet)
    _, first = ask(conversation, LONG)
    alone = ChatTemplate(amulet.model).encode([{"role": "user", "content": "And then?"}]).tokens.size
    for prefer, branches in ((None, 1), ("concise", 2), ("creative", 2), (["formal", "concise"], 3)):
        _, read = ask(conversation, "And then?", prefer=prefer)
        # The turn once, and for each branch its preference and the head of the answer.
        assert read <= alone + branches * 30 < first
    _, read = ask(conversation, "And then?", strength=0)
    assert read <= alone + 3 * 30


@pytest.mark.model
def test_answers_are_those_of_a_conversation_read_at_once(amulet: Amulet) -> None:
    conversation = Conversation(amulet, Settings(prefer="concise", max_tokens=8))
    for text in ("What is rain?", "And snow?"):
        ask(conversation, text)
    known = amulet.planner.transcripts(conversation.settings).known(conversation.messages)
    assert known is not None
    messages = [*conversation.messages, {"role": "user", "content": "And hail?"}]
    encoded = amulet.planner.template.encode(messages)
    held = amulet.planner.template.encode(messages, known)
    assert held.text == encoded.text
    read = b"".join(map(amulet.model.token_bytes, held.tokens.tolist()))
    assert read == b"".join(map(amulet.model.token_bytes, encoded.tokens.tolist()))


@pytest.mark.model
def test_tokens_that_the_tokenizer_would_not_choose_are_kept(amulet: Amulet) -> None:
    template = amulet.planner.template
    prompt = template.encode([{"role": "user", "content": "Hi"}])
    spelled = [int(amulet.model.tokenize(letter)[0]) for letter in "hello"]
    assert len(amulet.model.tokenize("hello")) < len(spelled)
    known = template.answered(prompt, "hello", spelled)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hello"}]
    following = template.encode([*turns, {"role": "user", "content": "Well?"}], known)
    assert following.tokens[: known.tokens.size].tolist() == known.tokens.tolist()
    # Another text than the one that is known is read as it is.
    turns[1]["content"] = "hello!"
    other = template.encode([*turns, {"role": "user", "content": "Well?"}], known)
    assert isinstance(other, Encoded)
    assert (
        other.tokens.tolist()
        == template.encode([*turns, {"role": "user", "content": "Well?"}]).tokens.tolist()
    )


@pytest.mark.model
def test_an_answer_is_written_again_in_another_style(amulet: Amulet) -> None:
    conversation = Conversation(amulet)
    with pytest.raises(PromptError, match="no answer"):
        conversation.restyle(strength=2)
    conversation.ask("What is a river?", prefer="concise", strength=2, max_tokens=30).answer()
    conversation.ask("Name one.", max_tokens=20).answer()
    before, pieces = list(conversation.messages), conversation.pieces
    again = conversation.restyle()
    assert again.answer().text == before[-1]["content"]
    assert [p.token for p in again.pieces] == [p.token for p in pieces]
    generation = again._job.generation
    assert generation is not None
    assert generation.n_right  # how many at a time depends on what steps take

    stopped = conversation.restyle(prefer="uplifting")
    assert conversation.messages == before  # while it is written, the old one stands
    stopped.close()
    assert conversation.messages == before
    assert conversation.restyle(strength=5).answer().text != before[-1]["content"]
    assert conversation.messages[:-1] == before[:-1]
    assert len(conversation.messages) == 4
    assert conversation.settings.strength == 5


@pytest.mark.model
def test_the_strength_changes_while_the_answer_is_written(amulet: Amulet) -> None:
    def write(change: bool) -> list[int | None]:
        conversation = Conversation(amulet)
        turn = conversation.ask(
            "Describe the sea.", prefer="creative", strength=0, fade="none", max_tokens=20
        )
        for _ in turn:
            if change and len(turn.pieces) == 5:
                turn.adjust(6)
        assert conversation.settings.strength == (6 if change else 0)
        moved = [p.explanation.divergence for p in turn.pieces if p.explanation is not None]
        assert len(moved) == len([p for p in turn.pieces if p.token is not None])
        return [piece.token for piece in turn.pieces]

    plain, changed = write(False), write(True)
    assert plain[:5] == changed[:5]
    assert plain != changed
    with pytest.raises(SettingError):
        Conversation(amulet).ask("Hi", max_tokens=1).adjust(1e9)


@pytest.mark.model
def test_a_cancelled_answer_is_kept_and_an_empty_one_is_not(amulet: Amulet) -> None:
    conversation = Conversation(amulet)
    turn = conversation.ask("Tell a story.")
    next(turn)
    turn.cancel()
    rest = list(turn)
    assert rest[-1].finish_reason == "cancelled"
    assert conversation.messages[-1]["content"] == turn.text != ""
    conversation.ask("And?").close()
    assert len(conversation.messages) == 2
    _, read = ask(conversation, "And?")
    assert read < 30
    assert conversation.undo() == "And?"
    assert conversation.undo() == "Tell a story."
    assert conversation.undo() is None


@pytest.mark.parametrize("placement", get_args(Placement))
def test_how_many_turns_to_forget_is_found_in_few_looks(
    tiny: Tiny, placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number as one by one; a thousand turns were read a thousand times."""
    looks = 0

    def look(self: Planner, *given: Any, **options: Any) -> Request:
        nonlocal looks
        looks += 1
        return request(self, *given, **options)

    request = Planner.request
    monkeypatch.setattr(Planner, "request", look)
    settings = Settings(prefer=["concise", "formal"], avoid="Rhyme.", placement=placement)
    said = [("user", "What is {}?"), ("assistant", "It is {} days.")]
    messages = [{"role": role, "content": text.format(i)} for i in range(60) for role, text in said]
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1) as amulet:
        conversation = Conversation(amulet, settings, messages)
        for text, needed in (("And?", 10), ("And?", 200), ("long " * 60, 10), ("And?", 500)):
            rooms = [conversation._room(text, n, settings) for n in range(61)]
            expected = next((n for n, room in enumerate(rooms) if room >= needed), 61)
            looks = 0
            assert conversation.room(text, needed) == (rooms[0], expected)
            assert looks < 12
        conversation.drop_oldest(expected := conversation.room("And?", 100)[1])
        assert conversation.messages == messages[2 * expected :]
        assert conversation.room("And?", 100)[1] == 0


@pytest.mark.model
def test_a_full_context_is_an_error_until_turns_are_dropped(amulet: Amulet) -> None:
    conversation = Conversation(amulet, Settings(system="Be kind.", max_tokens=8))
    for _ in range(3):
        ask(conversation, LONG)
    assert conversation.room(LONG, 1)[0] < 0
    with pytest.raises(PromptTooLongError):
        conversation.ask(LONG)
    assert len(conversation.messages) == 6  # nothing is cut silently
    conversation.drop_oldest(2)
    assert conversation.room(LONG, 1)[0] > 0
    assert conversation.settings.system == "Be kind."
    ask(conversation, LONG)
    conversation.drop_oldest(99)
    assert conversation.messages == []


@pytest.mark.model
def test_a_saved_cache_saves_reading_in_another_process(amulet: Amulet, real_model: Path) -> None:
    conversation = Conversation(amulet, Settings(prefer="concise"))
    ask(conversation, LONG)
    saved = conversation.save_cache()
    assert saved is not None
    for n_sequences in (2, 4):
        with Amulet.load(real_model, n_ctx=512, n_sequences=n_sequences) as other:
            resumed = Conversation(other, conversation.settings, conversation.messages)
            resumed.restore_cache(*saved)
            answer, read = ask(resumed, "And then?")
            assert read < 80
            assert answer


@pytest.mark.model
@pytest.mark.parametrize("strength", [1.0, 3.0])
def test_a_cache_is_saved_as_far_as_the_base_has_read(amulet: Amulet, strength: float) -> None:
    conversation = Conversation(amulet, Settings(prefer="concise", strength=strength, max_tokens=12))
    for text in (LONG, "And then?"):
        ask(conversation, text)
    saved = conversation.save_cache()
    assert saved is not None
    cached, _ = saved
    first, second = (turn["content"] for turn in conversation.messages if turn["role"] == "assistant")
    whole = amulet.planner.transcripts(conversation.settings).whole(conversation.messages)
    if strength == 1:  # the second answer did not need the base, which has not read it yet
        assert first in cached.text
        assert second not in cached.text
    else:  # the last token met the limit, and was not read
        assert len(cached.tokens) == len(whole.tokens) - 1


# Explanations of answers


@pytest.mark.model
def test_explain_shows_numbers_and_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    arguments = ["explain", "Describe the <b>sea</b>", "-p", "creative", "-n", "12"]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(main, [*arguments, "-s", "3", "--json", "--html", str(page)])
    assert result.exit_code == 0
    assert result.stderr == f"written: {page}\n"
    record = json.loads(result.stdout)
    tokens = record["tokens"]
    assert record["summary"]["tokens"] == len(tokens) == 12
    assert record["summary"]["changed"] == sum(token["changed"] for token in tokens)
    mean = sum(token["divergence"] for token in tokens) / 12
    assert math.isclose(record["summary"]["mean_divergence"], mean)
    assert mean > 0
    for token in tokens:
        listed = [each["probability"] for each in token["alternatives"]]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) <= 1 + 1e-4
    html = page.read_text()
    assert "Describe the &lt;b&gt;sea" in html
    assert "http" not in html.replace("http-equiv", "")
    result = CliRunner().invoke(main, arguments)  # the bundled model is only prompted
    assert "0 of 12 tokens changed, mean KL" in result.stdout
    assert "--strength 3 realigns" in result.stderr
    assert CliRunner().invoke(main, ["explain", "x"]).exit_code == 2


@pytest.mark.model
def test_at_strength_1_nothing_is_moved(amulet: Amulet) -> None:
    conversation = Conversation(amulet)
    ask(conversation, "Describe the sea.", prefer="creative", strength=1)
    summary = explained.summarize(conversation.pieces)
    assert summary.changed == 0
    assert summary.mean_divergence < 1e-4
    assert explained.strongest(conversation.pieces) == []
