"""The tokens that a model wrote are those that its conversation goes on with, whoever asks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fixture_types import Load, Tiny

from amulet_gguf.conversation.turns import Conversation
from amulet_gguf.llama.model import Model
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.transcripts import Transcripts
from amulet_gguf.service.service import AmuletService
from amulet_gguf.settings import Settings

HI = [{"role": "user", "content": "Hi"}]
MORE = {"role": "user", "content": "Well?"}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def transcripts(load: Load) -> Transcripts:
    return Planner(load("llama")).transcripts(Settings())


def spelled(model: Model, text: str) -> list[int]:
    """A text in more tokens than the tokenizer needs."""
    tokens = [int(model.tokenize(letter)[0]) for letter in text]
    assert len(tokens) > len(model.tokenize(text))
    return tokens


def test_an_answer_is_found_by_its_conversation_and_by_no_other(
    transcripts: Transcripts, tiny_model: Model
) -> None:
    tokens = spelled(tiny_model, "hello")
    transcripts.note(HI, tokens)
    known = transcripts.known(turns("Hi", "hello", "Well?"))
    assert known is not None
    assert known.tokens[-len(tokens) :].tolist() == tokens
    for other in (turns("Hi", "hello!"), turns("Hi!", "hello"), turns("Hi"), [], turns("H", "ihello")):
        assert transcripts.known(other) is None
    system = [{"role": "system", "content": ""}, *turns("Hi", "hello")]
    assert transcripts.known(system) is None


def test_a_turn_is_encoded_behind_the_turns_before_it(
    transcripts: Transcripts, tiny_model: Model
) -> None:
    first, second = spelled(tiny_model, "hello"), spelled(tiny_model, "there")
    transcripts.note(HI, first)
    transcripts.note(turns("Hi", "hello", "Well?"), second)
    known = transcripts.known(turns("Hi", "hello", "Well?", "there", "And?"))
    assert known is not None
    whole = known.tokens.tolist()
    assert whole[-len(second) :] == second
    assert any(whole[i : i + len(first)] == first for i in range(len(whole)))
    assert transcripts.whole(turns("Hi", "hello", "Well?", "there")).tokens.tolist() == whole


def test_answers_of_others_are_encoded_as_the_tokenizer_has_them(
    transcripts: Transcripts, tiny_model: Model
) -> None:
    whole = transcripts.whole(turns("Hi", "hello"))
    end = tiny_model.tokenize("hello")
    assert whole.tokens[-len(end) :].tolist() == end.tolist()


def test_the_oldest_answers_are_forgotten(transcripts: Transcripts, tiny_model: Model) -> None:
    tokens = tiny_model.tokenize("hello").tolist()
    for number in range(65):
        transcripts.note(turns(f"{number}"), tokens)
        transcripts.known(HI)
    assert transcripts.known(turns("0", "hello")) is None
    assert transcripts.known(turns("1", "hello")) is not None


def test_what_is_not_what_its_text_says_is_not_remembered(
    transcripts: Transcripts, tiny_model: Model
) -> None:
    """A client could put control tokens, or halves of characters, into another one's prompt."""
    control = int(tiny_model.tokenize("<|im_start|>", special=True)[0])
    assert tiny_model.token_bytes(control) == b""
    half = next(token for token in range(tiny_model.n_vocab) if tiny_model.token_bytes(token) == b"\xc3")
    hello = tiny_model.tokenize("hello").tolist()
    for tokens, text in (([*hello, control], "hello"), ([control], ""), ([*hello, half], "hello\ufffd")):
        transcripts.note(HI, tokens)
        assert transcripts.known(turns("Hi", text, "Well?")) is None


# Faces


@pytest.fixture
def service(tiny: Tiny) -> Iterator[AmuletService]:
    with AmuletService(tiny("llama"), n_ctx=512, n_threads=1, n_sequences=3) as service:
        yield service


def test_a_service_that_is_sent_texts_goes_on_with_the_tokens_that_it_wrote(
    service: AmuletService,
) -> None:
    """At a high temperature a model hardly ever writes what its tokenizer would."""
    model = service.wait_ready().model
    for seed in range(50):  # until nothing of it is a control token or half a character
        settings = Settings(max_tokens=24, temperature=3.0, seed=seed)
        answer = service.stream(messages=HI, settings=settings).answer()
        written = [piece.token for piece in answer.pieces if piece.token is not None]
        parts = list(map(model.token_bytes, written))
        if all(parts) and b"".join(parts) == answer.text.encode():
            break
    assert written != model.tokenize(answer.text).tolist()
    messages = [*HI, {"role": "assistant", "content": answer.text}, MORE]
    with service.stream(messages=messages, settings=settings) as stream:
        read = stream.answer().usage.prefill_tokens
    alone = len(service.wait_ready().planner.template.encode([MORE]).tokens)
    assert read <= alone + 5  # nothing of the first turn
    planned = service.wait_ready().planner.request(None, messages, settings, reuse=True).branches[0]
    assert any(
        planned[i : i + len(written)].tolist() == written for i in range(len(planned) - len(written))
    )


def test_a_conversation_works_on_a_service(service: AmuletService, tiny: Tiny) -> None:
    conversation = Conversation(service, Settings(max_tokens=8, prefer="concise"))
    stream = conversation.ask("How are you?")
    stream.adjust(strength=2)
    first = stream.answer()
    assert conversation.messages == turns("How are you?", first.text)
    assert conversation.settings.strength == 2
    assert conversation.pieces[0].explanation is not None
    assert conversation.room("And?", 1)[1] == 0
    saved = conversation.save_cache()
    assert saved is not None
    cached, data = saved
    assert len(cached.tokens) > 8
    with AmuletService(tiny("llama"), n_ctx=512, n_threads=1, n_sequences=3) as other:
        resumed = Conversation(other, conversation.settings, conversation.messages)
        resumed.restore_cache(cached, data)
        usage = resumed.ask("And?", prefer=None).answer().usage
        assert usage.prefill_tokens < usage.prompt_tokens - 20
    with conversation.ask("And?") as stream:
        next(stream)
    assert conversation.messages[2:] == (turns("And?", stream.text) if stream.text else [])


def test_tasks_converse_too(service: AmuletService) -> None:
    import asyncio

    async def converse() -> list[dict[str, str]]:
        conversation = Conversation(service, Settings(max_tokens=6))
        for text in ("How are you?", "And?"):
            async with conversation.ask(text) as stream:
                async for _ in stream:
                    pass
        return conversation.messages

    messages = asyncio.run(converse())
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


def test_a_failed_answer_adds_nothing(service: AmuletService) -> None:
    conversation = Conversation(service)
    with pytest.raises(Exception, match="empty"):
        conversation.ask(" ").answer()
    assert conversation.messages == []
    assert np.isfinite(conversation.room("x", 1)[0])


def test_an_answer_is_not_kept_in_messages_that_changed_meanwhile(service: AmuletService) -> None:
    conversation = Conversation(service, Settings(max_tokens=6))
    conversation.ask("How are you?").answer()
    stream = conversation.ask("And?")
    conversation.clear()
    assert stream.answer().text
    assert conversation.messages == []
