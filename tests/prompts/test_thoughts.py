"""Thoughts and answers, told apart in what models of all families write."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.prompts.thoughts import FAMILIES, IN_HISTORIES, Marks, Thoughts, find_marks, follows

QWEN = FAMILIES[-1]
GPT_OSS = FAMILIES[0]
families = pytest.mark.parametrize("marks", FAMILIES, ids=lambda marks: marks.closes)


def tell(marks: Marks, parts: list[str], state: str = "open") -> tuple[str, str]:
    """Return thought and answer of what was written in parts."""
    thoughts = Thoughts(marks, state)  # type: ignore[arg-type]
    found = {"thought": "", "answer": ""}
    for part in parts:
        for kind, text in thoughts.push(part):
            assert text
            found[kind] += text
    for kind, text in thoughts.push("", final=True):
        found[kind] += text
    return found["thought"], found["answer"]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@families
@given(
    places=st.lists(st.integers(0, 120), max_size=30),
    thought=st.text("ab <|>[/\n", max_size=20),
    answer=st.text("xy <", min_size=1, max_size=9).filter(lambda text: text.strip() and text[0] in "xy"),
)
def test_however_it_is_cut_the_same_is_told(
    marks: Marks, places: list[int], thought: str, answer: str
) -> None:
    gap = marks.answers[0] if marks.answers else "\n\n"
    written = f"{marks.opens[0]}{thought}{marks.closes}{gap}{answer}"
    if marks.closes in f"{thought}{marks.closes}"[:-1]:  # another end, before its own
        return
    assert tell(marks, cut(written, places)) == (thought, answer)
    assert tell(marks, cut(written[len(marks.opens[0]) :], places), "thought") == (thought, answer)


@families
@given(text=st.text("ab <|>\n", max_size=30), places=st.lists(st.integers(0, 30), max_size=9))
def test_who_does_not_think_is_not_touched(marks: Marks, text: str, places: list[int]) -> None:
    assert tell(marks, cut(text, places)) == ("", text)
    assert tell(marks, cut(text, places), "answer") == ("", text)


def test_thoughts_of_special_kinds() -> None:
    assert tell(QWEN, ["<think>", "never ended"]) == ("never ended", "")
    assert tell(QWEN, ["<think>", "half </thi"]) == ("half </thi", "")
    assert tell(QWEN, ["<think>\n\n</think>\n\nYes"]) == ("\n\n", "Yes")
    assert tell(QWEN, [" Hello <think>"]) == ("", " Hello <think>")
    channel = "<|channel|>"
    first = f"{channel}analysis<|message|>one<|end|><|start|>assistant{channel}final<|message|>two"
    assert tell(GPT_OSS, list(first)) == ("one", "two")
    assert tell(GPT_OSS, [f"{channel}final<|message|>two"]) == ("", "two")


@families
def test_a_prompt_says_what_follows_it(marks: Marks) -> None:
    assert follows(marks, "<user>Hi\n<assistant>\n") == "open"
    assert follows(marks, f"<user>Hi\n<assistant>\n{marks.opens[0]}\n") == "thought"
    assert follows(marks, f"<user>Hi\n<assistant>\n{marks.skipping}") == "answer"
    assert follows(marks, f"<user>Hi\n<assistant>{marks.opens[0]}Well.{marks.ending}") == "answer"


@families
def test_marks_are_found_in_templates_and_vocabularies(marks: Marks) -> None:
    assert find_marks(f"{{{{ '{marks.opens[0]}' }}}}", []) is marks
    assert find_marks("", [*marks.opens, marks.closes]) is marks
    assert find_marks("<|im_start|>", ["<|im_end|>"]) is None
    assert IN_HISTORIES


@families
def test_what_may_open_a_thought(marks: Marks) -> None:
    thoughts = Thoughts(marks, "open")
    assert thoughts.may_open(marks.opens[0][:1])
    assert thoughts.may_open(f"\n{marks.opens[0]}")
    assert not thoughts.may_open("\n")
    assert not thoughts.may_open("Hello")
    thoughts.push(marks.opens[0][:1])
    assert thoughts.may_open(marks.opens[0][1:])
    assert not thoughts.may_open("x")
