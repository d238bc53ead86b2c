"""Errors as clients expect them: in OpenAI's form, or that of the dialect that a path belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from amulet_gguf.errors import (
    AmuletError,
    ClosedError,
    ConfigError,
    PromptError,
    PromptTooLongError,
    QueueFullError,
    SettingError,
    TasteError,
)

_ANTHROPIC: Final = "/messages/"
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_OLLAMA: Final = "/api/"
#: Seconds after which a refused client may try again.
RETRY_AFTER: Final = 2


class RequestError(Exception):
    """A request that gets an error as its answer.

    Attributes:
        status: of HTTP.
        message: one line.
        code: for programs, or None.
        param: the field at fault, or None.
        more: numbers for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        more: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.more = dict(more or {})

    @classmethod
    def of(cls, error: AmuletError) -> RequestError:
        """Return what to tell a client of an error of the package."""
        message = str(error)
        if isinstance(error, PromptTooLongError):
            # Libraries that cut conversations look for the beginning of this sentence.
            message = (
                f"This model's maximum context length is {error.n_ctx} tokens, one of them for the "
                f"answer. However, your messages resulted in {error.n_prompt} tokens: shorten them."
            )
            more = {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
            return cls(400, message, code="context_length_exceeded", param="messages", more=more)
        if isinstance(error, SettingError):
            return cls(400, message, code="invalid_value", param=error.field)
        if isinstance(error.__cause__, OSError):  # a disk, not a request
            return cls(500, message, code="not_written")
        if isinstance(error, (PromptError, ConfigError, TasteError)):
            return cls(400, message, code="invalid_prompt")
        if isinstance(error, QueueFullError):
            return cls(503, message, code="queue_full")
        if isinstance(error, ClosedError):
            return cls(503, "the server is closing", code="closed")
        return cls(500, "the model could not go on with this answer", code="engine_error")

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 401:
            kind = "authentication_error"
        elif "n_ctx" in self.more:
            kind = "exceed_context_size_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}

    def body_for(self, path: str) -> dict[str, Any]:
        """Return what a client reads that asked at a path."""
        if f"{path.removeprefix('/v1')}/".startswith(_ANTHROPIC):
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            kind = kind if self.status < 500 or self.status == 503 else "api_error"
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": self.message} if path.startswith(_OLLAMA) else self.body

    def response_for(self, path: str) -> Response:
        """Return the response to a request at a path."""
        headers = {"retry-after": str(RETRY_AFTER)} if self.status == 503 else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return as_json(self.body_for(path), self.status, headers)


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response in ASCII: what a client sent may hold characters that no encoding takes."""
    return Response(json.dumps(content), status, dict(headers or {}), "application/json")
