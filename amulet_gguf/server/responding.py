"""Answers as OpenAI's Responses: items of an output, and the events that they grow by."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from amulet_gguf.engine.answer import Answer, CallPart, FinishReason, Kind, Piece, Usage
from amulet_gguf.server.desk import named_event
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.replies import call_id, timings_of
from amulet_gguf.server.streaming import EVENTS
from amulet_gguf.stream import AnswerStream

_CALL: Final = "function_call"
_REASONING: Final = "reasoning"
_MESSAGE: Final = "message"
_PARTS: Final = {_REASONING: "reasoning_text", _MESSAGE: "output_text"}


def _item(id: str, kind: str, text: str | None, status: str) -> dict[str, Any]:
    """Return an item of a response's output; without a text, one that has just begun."""
    content = [] if text is None else [_part(kind, text)]
    if kind == _REASONING:
        return {"id": id, "type": kind, "summary": [], "content": content, "status": status}
    return {"id": id, "type": kind, "role": "assistant", "status": status, "content": content}


def _call_item(id: str, call: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": _CALL,
        "call_id": call,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def _part(kind: str, text: str) -> dict[str, Any]:
    part = {"type": _PARTS[kind], "text": text}
    return part if kind == _REASONING else {**part, "annotations": [], "logprobs": []}


class ResponsesReply:
    """The response to one request; a `Reply`."""

    media_type = EVENTS

    def __init__(self, model: str, echo: Mapping[str, Any], has_timings: bool = False) -> None:
        """Begin a response.

        Args:
            echo: what it repeats of its request.
            has_timings: each part of a streamed text tells the times so far, as llama.cpp's.
        """
        self.id = f"resp_{secrets.token_hex(24)}"
        self._model = model
        self._echo = echo
        self._has_timings = has_timings
        self._created = int(time.time())
        self._n_events = 0
        self._output: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the item being written
        self._item_id = ""
        self._called = ("", "")  # id and name of the call being written
        self._text = ""
        self._reason: FinishReason | None = None

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        answer = answers[0]
        texts = [(_REASONING, answer.thought)] if answer.thought else []
        if answer.text.strip() or not answer.calls:
            texts.append((_MESSAGE, answer.text))
        for kind, text in texts:
            status = _status(answer.finish_reason) if kind == _MESSAGE else "completed"
            self._output.append(_item(_new_id(kind), kind, text, status))
        self._output += [
            _call_item(_new_id(_CALL), call_id(), call.name, call.arguments, "completed")
            for call in answer.calls
        ]
        return self._response(_status(answer.finish_reason), answer.usage)

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        self._stream = streams[0]
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]:
        done = {"total": n_prompt, "processed": n_read, "cache": 0}
        response = self._response("in_progress")
        yield self._event("response.in_progress", response=response, prompt_progress=done)

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        if piece.call is not None:
            yield from self._call(piece.call)
        elif piece.text and (self._kind != _CALL or piece.text.strip()):
            kind = _kind_of(piece.kind)
            if kind != self._kind:
                yield from self._end_item("completed")
                yield from self._begin_item(kind)
            self._text += piece.text
            more = {"timings": self._timings} if self._has_timings else {}
            yield self._part_event("delta", delta=piece.text, **more)
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        status = _status(self._reason)
        if self._kind not in (_MESSAGE, _CALL):
            yield from self._end_item("completed")
            yield from self._begin_item(_MESSAGE)  # an empty answer is one
        yield from self._end_item(status)
        response = self._response(status, streams[0].usage)
        yield self._event(f"response.{status}", response=response, timings=self._timings)

    def failed(self, error: RequestError) -> Iterable[bytes]:
        yield from self._end_item("incomplete")
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=response)

    def _call(self, part: CallPart) -> Iterable[bytes]:
        if part.name is not None:
            yield from self._end_item("completed")
            self._kind, self._item_id, self._text = _CALL, _new_id(_CALL), ""
            self._called = (call_id(), part.name)
            item = _call_item(self._item_id, *self._called, "", "in_progress")
            yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        if part.arguments:
            self._text += part.arguments
            place = {"item_id": self._item_id, "output_index": len(self._output)}
            yield self._event("response.function_call_arguments.delta", **place, delta=part.arguments)

    def _end_call(self, status: str) -> Iterable[bytes]:
        place = {"item_id": self._item_id, "output_index": len(self._output)}
        name = self._called[1]
        yield self._event(
            "response.function_call_arguments.done", **place, name=name, arguments=self._text
        )
        item = _call_item(self._item_id, *self._called, self._text, status)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._kind = None

    def _begin_item(self, kind: str) -> Iterable[bytes]:
        self._kind, self._item_id, self._text = kind, _new_id(kind), ""
        item = _item(self._item_id, kind, None, "in_progress")
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        yield self._event("response.content_part.added", **self._place, part=_part(kind, ""))

    def _end_item(self, status: str) -> Iterable[bytes]:
        if self._kind == _CALL:
            yield from self._end_call(status)
        if self._kind is None:
            return
        yield self._part_event("done", text=self._text)
        yield self._event(
            "response.content_part.done", **self._place, part=_part(self._kind, self._text)
        )
        item = _item(self._item_id, self._kind, self._text, status)
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._kind = None

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": len(self._output), "content_index": 0}

    @property
    def _timings(self) -> dict[str, Any]:
        return timings_of(self._stream.usage, self._stream.timings)

    def _part_event(self, what: str, **more: Any) -> bytes:
        """Return an event of the text being written."""
        assert self._kind is not None
        probabilities: dict[str, Any] = {} if self._kind == _REASONING else {"logprobs": []}
        name = f"response.{_PARTS[self._kind]}.{what}"
        return self._event(name, **self._place, **more, **probabilities)

    def _event(self, kind: str, **content: Any) -> bytes:
        number = self._n_events
        self._n_events += 1
        return named_event({"type": kind, "sequence_number": number, **content})

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "model": self._model,
            "output": list(self._output),
            "usage": None if usage is None else _counts(usage),
            **self._echo,
        }


def _new_id(kind: str) -> str:
    return {_REASONING: "rs_", _MESSAGE: "msg_", _CALL: "fc_"}[kind] + secrets.token_hex(24)


def _kind_of(kind: Kind) -> str:
    return _REASONING if kind == "thought" else _MESSAGE


def _status(reason: FinishReason | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _counts(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
