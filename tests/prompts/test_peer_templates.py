"""Real chat templates, rendered as transformers does; real vocabularies, tokenized as llama.cpp does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peer_models import peer_models

from amulet_gguf.errors import PromptError
from amulet_gguf.llama.handle import Handle, Owner
from amulet_gguf.llama.model import Model, _set_up, lib
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.prompts.messages import Message, conversation, with_preference
from amulet_gguf.prompts.template import ChatTemplate
from amulet_gguf.prompts.thoughts import follows, switches
from amulet_gguf.settings import Placement

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

MODELS = peer_models()
TEMPLATES = sorted(MODELS.glob("templates/*.jinja"))
SYSTEM: Message = {"role": "system", "content": "Be kind to everyone."}
FIRST: Message = {"role": "user", "content": "What is the sea?"}
ANSWER: Message = {"role": "assistant", "content": "Salt water, mostly."}
SECOND: Message = {"role": "user", "content": "And <b>why</b>?"}
CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [FIRST],
    "one turn, system": [SYSTEM, FIRST],
    "two turns": [FIRST, ANSWER, SECOND],
    "two turns, system": [SYSTEM, FIRST, ANSWER, SECOND],
}
# It cannot be rendered without them, by anybody.
NEEDS_MORE = {"fireworks-ai-llama-3-firefunction-v2.jinja": {"functions": "[]", "datetime": "May"}}


class Letters:
    """A vocabulary of bytes, with a chat template."""

    n_vocab, bos, eos, adds_bos = 258, 256, 257, False

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def special_texts(self) -> list[str]:
        return ["<s>", "</s>"]

    def token_text(self, token: int) -> str:
        return ["<s>", "</s>"][token - 256]

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def theirs(source: str, messages: list[dict[str, str]], names: dict[str, Any]) -> str | None:
    """What transformers makes of messages; None if it refuses them."""
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            conversations=[messages],
            chat_template=source,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
            **names,
        )
    except Exception:
        return None
    return str(text)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_render_as_transformers_does(path: Path) -> None:
    source = path.read_text("utf-8")
    names = NEEDS_MORE.get(path.name, {})
    template = ChatTemplate(Letters(source)).given(names)
    placements: list[Placement] = ["turn", "system"]
    for (kind, messages), preference, placement in itertools.product(
        CONVERSATIONS.items(), (None, "Be brief."), placements
    ):
        branch = with_preference(conversation(None, messages, None), preference, placement)
        found = template.encode(branch).text
        expected = theirs(source, branch, names)
        for part in [*messages, {"content": preference or ""}]:
            if part.get("role") != "assistant":
                assert part["content"] in found, kind
        system = branch[0]["content"] if branch[0]["role"] == "system" else ""
        if expected is not None and system in expected:  # else it left the system prompt out
            assert found == expected, kind


def test_all_of_them_are_there() -> None:
    assert len(TEMPLATES) >= 70


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_odd_conversations_are_reshaped_or_refused_in_one_line(path: Path) -> None:
    """Neighbours of one role, system prompts in the middle, a greeting: what was said is all there."""
    template = ChatTemplate(Letters(path.read_text("utf-8"))).given(NEEDS_MORE.get(path.name, {}))
    for messages in (
        [FIRST, SECOND],
        [ANSWER, FIRST],
        [SYSTEM, ANSWER, FIRST],
        [FIRST, ANSWER, SYSTEM, SECOND],
        [SYSTEM, FIRST, ANSWER, {"role": "developer", "content": "Be brief."}, SECOND],
        [FIRST, ANSWER, ANSWER, SECOND],
    ):
        try:
            text = template.encode(conversation(None, messages, None)).text
        except PromptError as error:
            pytest.fail(f"{[m['role'] for m in messages]}: {error}")
        for message in messages:
            assert message["content"] in text


#: What ends a thought, of the templates that name marks, by the beginnings of their files' names.
ENDS = {
    "</think>": (
        "Bielik GLM Kimi-K2-Thinking HuggingFaceTB LFM2.5 MiniMax-M2 NVIDIA Qwen-QwQ Qwen-Qwen3 Qwen3.5 "
        "Reka Spark StepFun deepseek ibm-granite-granite-3.3 inclusionai llama-cpp openbmb poolside"
    ),
    "</seed:think>": "ByteDance",
    "<|END_THINKING|>": "Cohere2MoE CohereForAI-c4ai-command-r7b",
    "</mm:think>": "MiniMax-M3",
    "[/THINK]": "mistralai-Ministral",
    "<channel|>": "google-gemma-4",
    "<|end|>": "openai-gpt-oss",
    "<|inner_suffix|>": "Apertus",
}
OPENS = "Cohere2MoE GLM-4.7 MiniMax-M2 NVIDIA StepFun deepseek-ai-DeepSeek-R1-Distill-Llama llama-cpp-d"
SWITCHES = "GLM-4.6 HuggingFaceTB Qwen-Qwen3 Qwen3.5 openbmb google-gemma-4 deepseek-ai-DeepSeek-V3 incl"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_the_marks_of_real_templates_are_found(path: Path) -> None:
    template = ChatTemplate(Letters(path.read_text("utf-8")))
    found = [] if template.marks is None else [template.marks.closes]
    assert found == [end for end, names in ENDS.items() if path.stem.startswith(tuple(names.split()))]
    if template.marks is None:
        return

    def state(**names: Any) -> str:
        branch = conversation(None, [FIRST], None)
        assert template.marks is not None
        return follows(template.marks, template.given(names).encode(branch).text)

    if path.stem.startswith(tuple(OPENS.split())):
        assert state() == "thought"
    if path.stem.startswith(tuple(SWITCHES.split())):
        assert state(**switches(False, None)) == "answer"
        assert state(**switches(True, None)) != "answer"
    # Whatever the template says, nobody thinks who is told not to.
    told = template.given(switches(False, None), skips_thoughts=True)
    assert follows(template.marks, told.encode(conversation(None, [FIRST], None)).text) == "answer"


VOCABULARIES = [path for path in sorted(MODELS.glob("*.gguf")) if Path(f"{path}.inp").exists()]


@pytest.mark.parametrize("path", VOCABULARIES, ids=lambda path: path.stem)
def test_real_vocabularies_tokenize_as_llama_cpp_does(path: Path) -> None:
    """The texts and tokens that llama.cpp tests itself with."""
    texts = Path(f"{path}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text("utf-8").splitlines()
    model = vocabulary_of(path)
    for text, line in zip(texts, lines, strict=False):
        assert model.tokenize(text).tolist() == list(map(int, line.split())), repr(text)
    assert len(lines) > 20


def vocabulary_of(path: Path) -> Model:
    """A model without weights, which `Model` does not load: it could not write."""
    _set_up()
    parameters = lib.llama_model_default_params()
    parameters.vocab_only = True
    model = Model.__new__(Model)
    pointer = lib.llama_model_load_from_file(str(path).encode(), parameters)
    assert pointer
    handle = Handle(pointer, lib.llama_model_free)
    Owner.__init__(model, handle, "model")
    model._vocabulary = Handle(lib.llama_model_get_vocab(handle), needs=handle)
    model.n_vocab = int(lib.llama_vocab_n_tokens(model._vocab))
    return model
