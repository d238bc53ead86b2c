"""What is answered: pieces become the objects of OpenAI's API."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

from amulet_gguf.engine.answer import Answer, CallPart, FinishReason, Piece, Timings, Usage
from amulet_gguf.method.explanation import Explanation
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.streaming import EVENTS
from amulet_gguf.stream import AnswerStream

#: Reported, as OpenAI does, where a probability is too small to have a logarithm.
_LEAST: Final = -9999.0
_REASONS: Final = {"stop": "stop", "length": "length", "cancelled": "stop"}
#: Of what computes the answers.
FINGERPRINT: Final = f"b{version('llama-cpp-python')}-amulet-{version('amulet-gguf')}"
DONE: Final = b"data: [DONE]\n\n"


#: Made once: `json.dumps` would make one for every token.
as_line: Final = json.JSONEncoder(separators=(",", ":")).encode


def event(content: Any) -> bytes:
    """Return a server-sent event."""
    return f"data: {as_line(content)}\n\n".encode()


def usage_of(usages: Iterable[Usage], n: int) -> dict[str, Any]:
    """Return the sum over n answers to each of some prompts, every prompt counted once."""
    found = list(usages)
    prompt = sum(usage.prompt_tokens for usage in found[::n])
    completion = sum(usage.completion_tokens for usage in found)
    counts: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in found[::n])},
    }
    if thought := sum(usage.thought_tokens for usage in found):
        counts["completion_tokens_details"] = {"reasoning_tokens": thought}
    return counts


def call_id() -> str:
    """Return the name of a call: nine letters and digits, since the templates of some take no others."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def timings_of(usage: Usage, timings: Timings) -> dict[str, Any]:
    """Return times as llama.cpp's server tells them."""
    n_read, n_written = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
    read, written = 1000 * timings.prefill, 1000 * timings.decode
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": n_read,
        "prompt_ms": read,
        "prompt_per_token_ms": read / max(1, n_read),
        "prompt_per_second": 1000 * n_read / read if read > 0 else 0.0,
        "predicted_n": n_written,
        "predicted_ms": written,
        "predicted_per_token_ms": written / max(1, n_written),
        "predicted_per_second": timings.tokens_per_second,
    }


@dataclass
class OpenAIReply:
    """The answer to one request, in either of OpenAI's forms.

    Probabilities of tokens are those after realignment, before sampling filters and penalties.

    Attributes:
        model: the name to report.
        is_chat: chat completions, or completions.
        token_bytes: gives a token's bytes.
        n_logprobs: most probable tokens to report beside each one that was written; None: report no
            probabilities at all, not even of that one.
        explain: add what realignment did to each token.
        n: answers to each prompt.
        has_usage: a stream ends with its counts.
        prompt: to be told with the answer, or None.
        has_timings: each part of a stream tells the times so far, as llama.cpp's.
    """

    model: str
    is_chat: bool
    token_bytes: Callable[[int], bytes]
    n_logprobs: int | None = None
    explain: bool = False
    n: int = 1
    has_usage: bool = False
    prompt: str | None = None
    has_timings: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(16)
        # The same in every part of a stream, most of which are as short as a token.
        self._begin_chunk = f"data: {as_line(self._head('chat.completion.chunk'))[:-1]},"
        self._offsets: dict[int, int] = {}  # of the text so far, by choice
        self._callers: set[int] = set()  # choices that call a function

    @property
    def media_type(self) -> str:
        return EVENTS

    @property
    def n_alternatives(self) -> int:
        """What the request must ask for as `n_alternatives`: an explanation has the probabilities."""
        wanted = 0 if self.n_logprobs is None else max(1, self.n_logprobs)
        return max(wanted, 5) if self.explain else wanted

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the object of an answer that was not streamed."""
        choices = []
        for index, answer in enumerate(answers):
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": self._reason(answer.finish_reason, bool(answer.calls)),
                "logprobs": self._logprobs(index, answer.pieces),
            }
            if self.is_chat:
                said = answer.text if answer.text.strip() or not answer.calls else None
                choice["message"] = {"role": "assistant", "content": said, "refusal": None}
                if answer.calls:
                    choice["message"]["tool_calls"] = [
                        {
                            "id": call_id(),
                            "type": "function",
                            "function": {"name": call.name, "arguments": call.arguments},
                        }
                        for call in answer.calls
                    ]
                if answer.thought:
                    choice["message"]["reasoning_content"] = answer.thought
            else:
                choice["text"] = answer.text
            if self.explain:
                choice["amulet"] = [
                    _moved(piece.text, piece.changed, piece.explanation)
                    for piece in answer.pieces
                    if piece.explanation is not None
                ]
            choices.append(choice)
        usage = usage_of((answer.usage for answer in answers), self.n)
        timings = timings_of(answers[0].usage, answers[0].timings)
        verbose = {} if self.prompt is None else {"__verbose": {"prompt": self.prompt}}
        return {
            **self._head("chat.completion"),
            "choices": choices,
            "usage": usage,
            "timings": timings,
            **verbose,
        }

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        """Yield the events that begin each choice."""
        self._streams = streams
        for index in range(len(streams) if self.is_chat else 0):
            yield self._chunk(index, {"role": "assistant", "content": None}, None)

    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]:
        """Yield the event of a part of the prompt that was read, as llama.cpp's server has it."""
        done = {"total": n_prompt, "processed": n_read, "cache": 0}
        choice = {"index": 0, "delta": {}, "finish_reason": None}
        head = self._head("chat.completion.chunk")
        yield event({**head, "choices": [choice], "prompt_progress": done})

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        """Yield the events of a piece: of its text or token, and of its end."""
        if piece.call is not None:
            yield self._call(index, piece.call)
        elif piece.kind == "thought":
            if self.is_chat and piece.text:
                yield self._chunk(index, {"reasoning_content": piece.text}, None)
        elif piece.text or (piece.explanation is not None and piece.token is not None):
            yield self._chunk(index, {"content": piece.text}, None, piece)
        if piece.finish_reason is not None:
            yield self._chunk(index, {}, self._reason(piece.finish_reason, index in self._callers))

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        """Yield the events that end a stream."""
        if self.has_usage:
            usage = usage_of((stream.usage for stream in streams), self.n)
            timings = timings_of(streams[0].usage, streams[0].timings)
            head = self._head("chat.completion.chunk")
            yield event({**head, "choices": [], "usage": usage, "timings": timings})
        yield DONE

    def failed(self, error: RequestError) -> Iterable[bytes]:
        """Yield the event of a stream that breaks off."""
        yield event(error.body)

    @staticmethod
    def _reason(reason: FinishReason, has_called: bool) -> str:
        return "tool_calls" if has_called and reason == "stop" else _REASONS[reason]

    def _call(self, index: int, part: CallPart) -> bytes:
        self._callers.add(index)
        call: dict[str, Any] = {"index": part.number, "function": {"arguments": part.arguments}}
        if part.name is not None:
            call |= {"id": call_id(), "type": "function"}
            call["function"] = {"name": part.name, "arguments": part.arguments}
        return self._chunk(index, {"tool_calls": [call]}, None)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _chunk(
        self, index: int, delta: dict[str, Any], reason: str | None, piece: Piece | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self.is_chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        if piece is not None and piece.explanation is not None:
            choice["logprobs"] = self._logprobs(index, [piece])
            if self.explain:
                choice["amulet"] = _moved(piece.text, piece.changed, piece.explanation)
        rest: dict[str, Any] = {"choices": [choice]}
        if self.has_timings and "role" not in delta:  # before anything is written there is no time
            stream = self._streams[index]
            rest["timings"] = timings_of(stream.usage, stream.timings)
        return f"{self._begin_chunk}{as_line(rest)[1:]}\n\n".encode()

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self.n_logprobs is None:
            return None
        tokens = []
        offsets = []
        for piece in pieces:
            offset = self._offsets.get(index, 0)
            self._offsets[index] = offset + len(piece.text) * (piece.kind == "answer")
            if piece.token is None or piece.explanation is None:
                continue
            offsets.append(offset)
            best = piece.explanation.alternatives[: self.n_logprobs]
            entry = self._entry(piece.token, piece.explanation.probability)
            top = [self._entry(each.token, each.probability) for each in best]
            tokens.append({**entry, "top_logprobs": top})
        if self.is_chat:
            return {"content": tokens, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in tokens],
            "token_logprobs": [entry["logprob"] for entry in tokens],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in tokens
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, probability: float) -> dict[str, Any]:
        data = self.token_bytes(token)
        logprob = math.log(probability) if probability > 0 else _LEAST
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def _moved(text: str, changed: bool, explanation: Explanation) -> dict[str, Any]:
    """Return what realignment did to a token."""
    about = dataclasses.asdict(explanation)
    return {"text": text, "changed": changed, "shade": explanation.shade, **about}
