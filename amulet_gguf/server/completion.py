"""Raw prompts as llama.cpp's own server takes and answers them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from pydantic import Field

from amulet_gguf.engine.answer import Answer, Piece, Timings, Usage
from amulet_gguf.server.asked import MAX_ANSWERS
from amulet_gguf.server.desk import unusable
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.replies import event, timings_of
from amulet_gguf.server.schema import Open, Whole
from amulet_gguf.server.streaming import EVENTS
from amulet_gguf.settings import Settings
from amulet_gguf.stream import AnswerStream

#: A prompt: texts, in which names of control tokens mean them, and tokens.
Parts: TypeAlias = Sequence["str | int"]

_MAX_PROBABILITIES: Final = 100
_LEAST: Final = -9999.0  # for a probability that is too small to have a logarithm
_ANY_SEED: Final = 2**32 - 1
#: What llama.cpp's server tells of samplers that are not here: that they do nothing.
_OFF: Final = {
    "adaptive_decay": 0.9,
    "adaptive_target": -1.0,
    "dry_multiplier": 0.0,
    "dynatemp_range": 0.0,
    "lora": [],
    "mirostat": 0,
    "n_keep": 0,
    "top_n_sigma": -1.0,
    "typical_p": 1.0,
    "xtc_probability": 0.0,
}


class CompletionBody(Open):
    """POST /completion; settings stand beside what is named here."""

    prompt: Any
    model: str | None = None
    stream: bool | None = None
    n_cmpl: Whole | None = Field(None, ge=1, le=MAX_ANSWERS)
    n_probs: Whole | None = Field(None, ge=0, le=_MAX_PROBABILITIES)
    return_tokens: bool | None = None
    response_fields: list[str] | None = Field(None, max_length=100)
    profile: str | None = None


def prompts_of(given: Any) -> list[Parts]:
    """Return the prompts of a request: one, or those of a list.

    Raises:
        RequestError: something else.
    """
    if not isinstance(given, list) or any(_is_token(part) for part in given):
        return [_parts(given)]
    if not 1 <= len(given) <= MAX_ANSWERS:
        raise unusable(f"one request may have 1 to {MAX_ANSWERS} prompts", "prompt")
    return [_parts(each) for each in given]


def _parts(given: Any) -> Parts:
    """Return one prompt; errors as `prompts_of`."""
    if isinstance(given, Mapping):
        if given.get("multimodal_data"):
            raise unusable("image input is not supported by this server", "prompt")
        given = given.get("prompt_string")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and all(isinstance(part, str) or _is_token(part) for part in given):
        return given
    raise unusable("a prompt must be a text, or a list of tokens and texts", "prompt")


def _is_token(part: Any) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


def told(settings: Settings, n_probs: int, is_streamed: bool) -> dict[str, Any]:
    """Return settings in the words of llama.cpp, and those that are not its own."""
    known = settings.as_record()
    names = (
        "frequency_penalty", "grammar", "logit_bias", "max_tokens", "min_p", "presence_penalty",
        "repeat_last_n", "repeat_penalty", "stop", "temperature", "top_k", "top_p",
        "strength", "prefer", "avoid",
    )  # fmt: skip
    return {
        **_OFF,
        **{name: known[name] for name in names},
        "grammar": settings.grammar or "",
        "n_predict": settings.max_tokens,
        "n_probs": n_probs,
        "seed": _ANY_SEED if settings.seed is None else settings.seed,
        "stream": is_streamed,
    }


class CompletionReply:
    """The answer to raw prompts; a `Reply`."""

    media_type = EVENTS

    def __init__(
        self,
        model: str,
        prompts: Sequence[str],
        about: Mapping[str, Any],
        body: CompletionBody,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        """Answer.

        Args:
            prompts: as they were read, one for each answer.
            about: the settings, to be told.
        """
        self.id = f"completion-{secrets.token_hex(16)}"
        self._model = model
        self._prompts = prompts
        self._about = about
        self._fields = body.response_fields
        self._n_probs = body.n_probs or 0
        self._has_tokens = bool(body.return_tokens)
        self._token_bytes = token_bytes
        self._streams: Sequence[AnswerStream] = ()

    def whole(self, answers: Sequence[Answer]) -> Any:
        found = []
        for index, answer in enumerate(answers):
            tokens = [piece.token for piece in answer.pieces if piece.token is not None]
            said = {"content": answer.text, "tokens": tokens if self._has_tokens else []}
            probabilities = self._probabilities(answer.pieces)
            last = answer.pieces[-1]
            end = self._end(index, last, answer.text, answer.usage, answer.timings)
            found.append(self._chosen({**said, **end, **probabilities}))
        return found[0] if len(found) == 1 else found

    def opening(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        self._streams = streams
        return ()

    def progress(self, n_read: int, n_prompt: int) -> Iterable[bytes]:
        return ()

    def events(self, index: int, piece: Piece) -> Iterable[bytes]:
        stream = self._streams[index]
        if piece.text or piece.token is not None:
            usage = stream.usage
            said = {
                "index": index,
                "content": piece.text,
                "tokens": [] if piece.token is None else [piece.token],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": usage.completion_tokens,
                "tokens_evaluated": usage.prompt_tokens,
            }
            yield event({**said, **self._probabilities([piece])})
        if piece.finish_reason is not None:
            end = self._end(index, piece, stream.text, stream.usage, stream.timings)
            yield event(self._chosen({"content": "", "tokens": [], **end}))

    def closing(self, streams: Sequence[AnswerStream]) -> Iterable[bytes]:
        return ()

    def failed(self, error: RequestError) -> Iterable[bytes]:
        yield event(error.body)

    def _end(self, index: int, last: Piece, text: str, usage: Usage, timings: Timings) -> dict[str, Any]:
        return {
            "index": index,
            "id_slot": -1,
            "stop": True,
            "model": self._model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "generation_settings": self._about,
            "prompt": self._prompts[index],
            "has_new_line": "\n" in text,
            "truncated": False,
            "stop_type": _stop_type(last),
            "stopping_word": last.stopped_by or "",
            "tokens_cached": usage.cached_tokens,
            "timings": timings_of(usage, timings),
        }

    def _chosen(self, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields that were asked for, by paths such as "generation_settings/seed"."""
        if not self._fields:
            return result
        found: dict[str, Any] = {}
        for path in self._fields:
            value: Any = result
            for step in path.split("/"):
                value = value.get(step) if isinstance(value, Mapping) else None
            if value is not None:
                found[path] = value
        return found

    def _probabilities(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if not self._n_probs:
            return {}
        found = []
        for piece in pieces:
            if piece.token is not None and piece.explanation is not None:
                best = piece.explanation.alternatives[: self._n_probs]
                top = [self._probability(each.token, each.probability) for each in best]
                chosen = self._probability(piece.token, piece.explanation.probability)
                found.append({**chosen, "top_logprobs": top})
        return {"completion_probabilities": found}

    def _probability(self, token: int, probability: float) -> dict[str, Any]:
        data = self._token_bytes(token)
        logprob = math.log(probability) if probability > 0 else _LEAST
        text = data.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}


def _stop_type(last: Piece) -> str:
    if last.stopped_by is not None:
        return "word"
    return {"length": "limit", "stop": "eos"}.get(last.finish_reason or "", "none")
