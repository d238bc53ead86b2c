"""Messages in the forms that clients send, and in those that templates can bear."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fixture_types import Load
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.errors import PromptError, SettingError
from amulet_gguf.prompts.messages import conversation, reshaped, with_preference
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

LETTERS = {"s": "system", "u": "user", "a": "assistant"}


def said(text: str) -> list[dict[str, str]]:
    """ "s1 u2" are a system prompt "1" and a message "2" of the user."""
    return [{"role": LETTERS[word[0]], "content": word[1:]} for word in text.split()]


def written(messages: list[dict[str, str]]) -> str:
    return " ".join(each["role"][0] + each["content"].replace("\n\n", "+") for each in messages)


@pytest.mark.parametrize(
    ("given", "forms"),
    [
        ("u1 a2 u3", []),
        ("s1 u2", ["u1+2"]),
        ("u1 u2", ["u1+2"]),
        ("s1 s2 u3", ["s1+2 u3", "s1 u2+3", "u1+2+3"]),
        ("u1 a2 s3 u4", ["u1 a2 u3+4"]),
        ("s1 u2 a3 s4 u5", ["s1 u2 a3 u4+5", "u1+2 a3 u4+5"]),
        ("a1 u2", ["u a1 u2"]),
        ("s1 a2 u3", ["s1 u a2 u3", "a2 u1+3", "u a2 u1+3"]),  # never into a greeting
        ("u1 a2 a3 u4", ["u1 a2+3 u4"]),
        ("u1 s2", ["u1+2"]),
    ],
)
def test_other_forms_of_a_conversation(given: str, forms: list[str]) -> None:
    assert [written(form) for form in reshaped(said(given))] == forms


@given(st.lists(st.tuples(st.sampled_from("sua"), st.text("xy ", max_size=3)), max_size=8))
def test_no_form_loses_what_was_said(messages: list[tuple[str, str]]) -> None:
    numbered = [
        {"role": LETTERS[role], "content": f"{i}{text}"} for i, (role, text) in enumerate(messages)
    ]
    has_user = any(each["role"] == "user" for each in numbered)
    for form in reshaped(numbered):
        together = "\n\n".join(each["content"] for each in form)
        for message in numbered:
            if has_user or message["role"] != "system":
                assert message["content"] in together
        assert all(a["role"] != b["role"] for a, b in itertools.pairwise(form))


def test_contents_of_all_kinds() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
        {"role": "assistant", "content": "So"},
    ]
    assert written(conversation(None, messages, None)) == "sBe kind. uHi a u aSo"
    for wrong in (None, 3, [3], ["Hi"], [{"type": "image_url"}], [{"type": "text"}]):
        with pytest.raises(PromptError, match="must be a text"):
            conversation(None, [{"role": "user", "content": wrong}], None)


def test_a_preference_stands_before_the_beginning_of_an_answer() -> None:
    messages = said("s1 u2 a3 u4 a5")
    assert written(with_preference(messages, "P", "turn")) == "s1 u2 a3 u4+P a5"
    assert written(with_preference(messages, "P", "system")) == "s1 P u2 a3 u4 a5"


def test_an_answer_that_is_begun_is_gone_on_with(load: Load) -> None:
    """In every branch its tokens follow the header of the assistant's turn."""
    planner = Planner(load("llama"))
    settings = Settings(prefer="concise", strength=3)
    question = {"role": "user", "content": "What is the sea?"}
    begun = planner.request(None, [question, {"role": "assistant", "content": "Water,"}], settings)
    for with_it, without in zip(
        begun.branches, planner.request(None, [question], settings).branches, strict=True
    ):
        text = load("llama").tokenize("Water,").tolist()
        spelled = b"".join(map(load("llama").token_bytes, with_it.tolist()))
        assert with_it[: len(without)].tolist() == without.tolist()
        assert spelled.endswith(b"assistant\nWater,")
        assert len(with_it) <= len(without) + len(text) + 1
    with pytest.raises(PromptError, match="must end with"):
        planner.request(None, [{"role": "assistant", "content": "Water,"}], settings)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if thinking is defined %}thinking {{ thinking }} {{ depth }}{% endif %}"
)


def test_the_template_finds_what_is_given_to_it(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("llama")
    monkeypatch.setattr(model, "chat_template", TEMPLATE)
    planner = Planner(model)

    def text(**options: Any) -> str:
        (branch,) = planner.request("Hi", None, Settings(**options)).branches
        return b"".join(map(model.token_bytes, branch.tolist())).decode().strip()

    assert text() == "user: Hi"
    assert text(template_args={"thinking": False, "depth": [1]}) == "user: Hi\nthinking False [1]"
    assert text(template_args=["thinking=low", "depth=2"]) == "user: Hi\nthinking low 2"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (["thinking"], "expected NAME=VALUE"),
        (["=3"], "is no name"),
        ({"a b": 1}, "is no name"),
        ({"a": float("nan")}, "is not JSON"),
        ({"a": object()}, "is not JSON"),
        ({"a": "x" * 70_000}, "at most 65536 characters"),
        ({"messages": []}, "is given to templates as it is"),
        (3, "must give values to names"),
    ],
)
def test_what_no_template_can_be_given(wrong: Any, complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint):
        Settings(template_args=wrong)
