"""Thoughts of all families, forced on a tiny model: never realigned, one row each, and told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from fixture_types import Tiny
from peer_models import peer_models

from amulet_gguf import Amulet, Answer, Settings
from amulet_gguf.engine.request import Request
from amulet_gguf.method.arrays import Float32Array
from amulet_gguf.method.sampling import Sampler
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.sandbox import CHATML
from amulet_gguf.prompts.thoughts import FAMILIES, Marks, find_marks, follows

QUESTION = "How are you?"
families = pytest.mark.parametrize("marks", FAMILIES, ids=lambda marks: marks.closes)


class Scripted(Sampler):
    """Writes what it is told, whatever the logits are; it keeps those of each token."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self._rest = list(tokens)
        self.rows: list[Float32Array] = []

    def sample(self, logits: Float32Array) -> int:
        self.rows.append(logits.copy())
        return self._rest.pop(0)


@contextmanager
def thinker(tiny: Tiny, folder: Path, marks: Marks, opens: bool = False) -> Iterator[Amulet]:
    """A model whose chat template knows marks, and opens a thought itself if asked."""
    template = folder / "template.jinja"
    begin = "{% if enable_thinking is not defined or enable_thinking %}" + marks.opens[0] + "{% endif %}"
    template.write_text(CHATML + "{# " + marks.opens[0] + " #}" + (begin if opens else ""), "utf-8")
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1, chat_template=template) as amulet:
        yield amulet


def write(amulet: Amulet, text: str, **options: Any) -> tuple[Answer, list[int], Scripted]:
    """Return an answer of which all is written as it is told, and the rows of each step."""
    model = amulet.model
    scripted = Scripted([*model.tokenize(text, special=True).tolist(), model.eos])
    rows: list[int] = []
    context = amulet.engine._sequences.context
    add = context.add

    def count(sequence: int, tokens: Any, **more: Any) -> None:
        rows[-1] += len(tokens)
        add(sequence, tokens, **more)

    step = amulet.engine.step

    def counted() -> bool:
        rows.append(0)
        return step()

    def plan(planner: Planner, settings: Settings) -> Request:
        return replace(planner.request(QUESTION, None, settings), sampler=scripted)

    context.add, amulet.engine.step = count, counted  # type: ignore[method-assign]
    try:
        settings = Settings(**{"prefer": "concise", "strength": 3, "fade": 0, **options})
        return amulet.start(plan, settings).answer(), rows, scripted
    finally:
        del context.add, amulet.engine.step


THINKING = {
    path.stem: path
    for path in sorted(peer_models().glob("templates/*.jinja"))
    if find_marks(path.read_text("utf-8"), ()) is not None
}


@pytest.mark.parametrize("name", THINKING)
def test_real_templates_with_their_control_tokens(tmp_path: Path, name: str) -> None:
    """A model that has both: the thought is found where the template's prompt leaves off."""
    source = THINKING[name].read_text("utf-8")
    marks = find_marks(source, ())
    assert marks is not None
    # The marks are tokens of their own, as in the families' vocabularies, and what else looks so.
    control = {mark for mark in marks.all if "|>" not in mark.strip("<|>")}
    control |= set(
        re.findall(r"<\|[\w:]+\|>|<\|[a-z]+>|<[a-z]+\|>|<[｜][^<>]+[｜]>|\[/?[A-Z_]+\]", source)
    )
    file = tiny_models.build(
        "qwen3", tmp_path / "model.gguf", chat_template=source, control_tokens=sorted(control)
    )
    with Amulet.load(file, n_ctx=2048, n_threads=1) as amulet:
        model = amulet.model
        assert control <= set(model.special_texts())
        prompt = amulet.planner.request(QUESTION, None, Settings(think=True)).branches[0]
        names = {t: model.token_text(t) for t in set(prompt.tolist())}
        spelled = [names[t].encode() if names[t] in control else model.token_bytes(t) for t in prompt]
        text = b"".join(spelled).decode()
        state = follows(marks, text)
        assert state != "answer"
        told = ("" if state == "thought" else marks.opens[0]) + f"hm well{between(marks)}I am fine"
        answer, rows, _ = write(amulet, told, think=True)
        assert (answer.thought, answer.text) == ("hm well", "I am fine")
        assert rows.count(1) >= len(model.tokenize("hm well")) - 1
        assert rows[-3:] == [2, 2, 2]


def between(marks: Marks) -> str:
    return marks.closes + (marks.answers[0] if marks.answers else "\n\n")


@families
@pytest.mark.parametrize("opens", [False, True])
def test_a_thought_costs_a_row_a_token_and_the_answer_two(
    tiny: Tiny, tmp_path: Path, marks: Marks, opens: bool
) -> None:
    with thinker(tiny, tmp_path, marks, opens) as amulet:
        told = f"hm well{between(marks)}I am fine"
        answer, rows, _ = write(amulet, told if opens else marks.opens[0] + told)
        assert (answer.thought, answer.text) == ("hm well", "I am fine")
        assert answer.finish_reason == "stop"
        n_answer = len(amulet.model.tokenize("I am fine"))
        usage = answer.usage
        assert abs(usage.completion_tokens - usage.thought_tokens - n_answer) <= 1
        n_last = usage.completion_tokens - usage.thought_tokens
        assert rows[-n_last + 1 :] == [2] * (n_last - 1)
        n_thinking = len(amulet.model.tokenize("hm well")) - 2
        assert rows.count(1) >= n_thinking
        last = len(rows) - 1 - rows[::-1].index(1)
        assert rows[last + 1] > 2  # what the other branch missed comes in one go
        kinds = [piece.kind for piece in answer.pieces]
        assert kinds.index("answer", kinds.index("thought")) > kinds.index("thought")


@families
def test_what_comes_after_a_thought_is_what_its_branches_say(
    tiny: Tiny, tmp_path: Path, marks: Marks
) -> None:
    """The answer's distributions, against those of branches that read every token at its time."""
    told = f"{marks.opens[0]}hm{between(marks)}I am fine"
    with thinker(tiny, tmp_path, marks) as amulet:
        _, _, lazy = write(amulet, told, repeat_penalty=1)
        _, rows, eager = write(amulet, told, repeat_penalty=1, align_thoughts=True)
    assert 1 not in rows[1:]
    n = 3
    for one, other in zip(lazy.rows[-n:], eager.rows[-n:], strict=True):
        kept = np.isfinite(one) & np.isfinite(other)
        np.testing.assert_allclose(one[kept], other[kept], atol=2e-3)


def test_thoughts_have_no_limit_but_their_own(tiny: Tiny, tmp_path: Path) -> None:
    marks = FAMILIES[-1]
    with thinker(tiny, tmp_path, marks, opens=True) as amulet:
        long = "well " * 30
        answer, _, _ = write(amulet, f"{long}</think>I am fine and so are you", max_tokens=4)
        assert answer.thought == long.strip()
        assert answer.finish_reason == "length"
        assert answer.usage.completion_tokens - answer.usage.thought_tokens == 4

        cut, _, scripted = write(amulet, "well " * 30, think_tokens=6, max_tokens=3)
        assert cut.thought.startswith("well ")
        assert len(cut.thought) < 60
        assert cut.usage.completion_tokens - cut.usage.thought_tokens == 3
        assert cut.text  # written behind the end of the thought, as if it were the answer
        ending = amulet.model.tokenize(marks.ending, special=True)
        assert cut.usage.thought_tokens == 6 + len(ending)
        assert len(scripted.rows) == 6 + 3


def test_stop_strings_and_facts_are_the_answers_alone(tiny: Tiny, tmp_path: Path) -> None:
    with thinker(tiny, tmp_path, FAMILIES[-1], opens=True) as amulet:
        answer, _, _ = write(amulet, "I am fine</think>\n\nSo I am fine", stop=["am"])
        assert answer.thought == "I am fine"
        assert answer.text == "So I "
        assert answer.finish_reason == "stop"


def test_names_of_control_tokens_stop_the_answer_but_no_thought(tiny: Tiny, tmp_path: Path) -> None:
    with thinker(tiny, tmp_path, FAMILIES[-1], opens=True) as amulet:
        told = "well<|im_start|>well</think>I am<|im_start|>fine"
        answer, _, _ = write(amulet, told, stop=["<|im_start|>", "nothing"])
        assert (answer.thought, answer.text, answer.finish_reason) == ("wellwell", "I am", "stop")
        answer, _, _ = write(amulet, told)
        assert answer.text == "I amfine"


def test_who_is_told_not_to_think_answers_at_once(tiny: Tiny, tmp_path: Path) -> None:
    marks = FAMILIES[-1]
    for opens in (False, True):
        with thinker(tiny, tmp_path, marks, opens) as amulet:
            request = amulet.planner.request(QUESTION, None, Settings(think=False))
            text = b"".join(map(amulet.model.token_bytes, request.branches[0].tolist())).decode()
            assert text.endswith("<think>\n\n</think>\n\n")
            assert request.thoughts is None
            answer, _, _ = write(amulet, "I am fine", think=False)
            assert (answer.thought, answer.text) == ("", "I am fine")


@families
def test_a_model_that_ends_in_its_thought_is_asked_for_the_answer(
    tiny: Tiny, tmp_path: Path, marks: Marks
) -> None:
    with thinker(tiny, tmp_path, marks) as amulet:
        answer, _, _ = write(amulet, f"{marks.opens[0]}well<|im_end|>I am fine")
        assert (answer.thought, answer.text, answer.finish_reason) == ("well", "I am fine", "stop")


def test_a_thought_leaves_room_for_an_answer(tiny: Tiny, tmp_path: Path) -> None:
    with thinker(tiny, tmp_path, FAMILIES[-1], opens=True) as amulet:
        answer, _, _ = write(amulet, "well " * 600, max_tokens=40)
        usage = answer.usage
        assert usage.completion_tokens - usage.thought_tokens == 40
        assert usage.prompt_tokens + usage.completion_tokens >= 500  # of 512
        assert answer.finish_reason == "length"


def test_nothing_makes_an_answer_longer_than_it_may_be(tiny: Tiny, tmp_path: Path) -> None:
    """White space that might come before a mark, thoughts that begin again, an answer at once."""
    with thinker(tiny, tmp_path, FAMILIES[-1]) as amulet:
        for text, options in (
            ("\n" * 90 + "I am fine", {"max_tokens": 4}),
            ("<think>well</think>" + "\n" * 200, {"max_tokens": 4}),
            ("<think>well " * 60, {"max_tokens": 4, "think_tokens": 3}),
            ("<th I am fine and well", {"max_tokens": 3}),
            ("I am fine", {"max_tokens": 1}),
        ):
            answer, _, _ = write(amulet, text, **options)
            usage = answer.usage
            assert usage.completion_tokens - usage.thought_tokens == options["max_tokens"], text
            assert usage.thought_tokens < 100
            assert answer.finish_reason == "length"


def test_a_character_that_begins_with_the_answer_is_whole(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with thinker(tiny, tmp_path, FAMILIES[-1]) as amulet:
        spelled = {300: "好".encode() + b"\xe4\xbd", 301: b"\xa0"}
        token_bytes = amulet.model.token_bytes
        monkeypatch.setattr(
            amulet.model, "token_bytes", lambda token: spelled.get(token) or token_bytes(token)
        )
        scripted = Scripted([300, 301, amulet.model.eos])
        stream = amulet.start(
            lambda planner, settings: replace(planner.request("Hi", None, settings), sampler=scripted),
            Settings(),
        )
        assert stream.answer().text == "好你"


@families
@pytest.mark.parametrize("opens", [False, True])
def test_a_grammar_is_the_answers_alone(tiny: Tiny, tmp_path: Path, marks: Marks, opens: bool) -> None:
    """The thought is free, and so are the marks; where the answer begins, nothing else is possible."""
    with thinker(tiny, tmp_path, marks, opens) as amulet:
        # Behind a mark of the answer, its first letters are forced; else the mark of a thought may come.
        begin = marks.answers[0] if marks.answers else "a"
        told = f"hm well{marks.closes}{begin}!"
        answer, _, scripted = write(
            amulet, (told if opens else marks.opens[0] + told), regex="abc of the sea[.!]"
        )
        assert answer.thought == "hm well"
        assert answer.text == "abc of the sea!"
        last = {amulet.model.token_bytes(int(i)) for i in np.flatnonzero(scripted.rows[-1] > -1e8)}
        assert last <= {b".", b"!"}  # plausibility may leave one
        n_allowed = (scripted.rows[0] > -1e8).sum()
        assert n_allowed > 100 if opens else n_allowed <= 1 + len(marks.opens) + len(marks.answers)
