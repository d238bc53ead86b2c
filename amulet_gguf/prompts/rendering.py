"""Chat templates in Jinja's sandbox: messages become text, as the template of a model file says.

A template runs without access to Python's internals. How long it may take, and with how much memory, is
bounded by the process that it runs in: this file is also the program of that process (see
`amulet_gguf.prompts.sandbox`), which is why it imports next to nothing of this package. A template finds
what transformers has for it: loop controls, `generation` blocks, `tojson`, `raise_exception`,
`strftime_now`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amulet_gguf.system.platforms import end_after, limit_memory

#: Characters of a rendered conversation; far more than a context holds.
MAX_TEXT: Final = 4_000_000
_MAX_REPEATED: Final = 100_000  # items or characters of "x" * n in a template
_MAX_MEMORY: Final = 192 * 2**20  # bytes of address space; it begins with 25 MiB
_ORPHANED: Final = 5  # seconds: who asked is gone


class RefusedError(Exception):
    """A template is not valid, fails, or refuses a conversation; "the chat template" goes before it."""


def render(source: str, names: Mapping[str, Any] | None) -> str:
    """Return what a template makes of names.

    Args:
        names: values by their names, `now` (ISO 8601) for `strftime_now` among them. None: the template
            is compiled alone.

    Raises:
        RefusedError: see there.
        MemoryError: there is too little for it.
    """
    template = _compiled(source)
    if names is None:
        return ""
    now = datetime.fromisoformat(names["now"])
    known = {**names, "strftime_now": now.strftime}
    try:
        return _rendered(template, {"tools": None, "documents": None, **known})
    except RefusedError as error:  # transformers has them so, but some look for what is defined
        try:
            return _rendered(template, known)
        except RefusedError:
            raise error from None


def _rendered(template: jinja2.Template, known: Mapping[str, Any]) -> str:
    try:
        text = template.render(known)
    except MemoryError:
        raise
    except Exception as error:  # whatever a template can make Python raise
        raise RefusedError(f"failed: {_reason(error)}") from None
    if len(text) > MAX_TEXT:
        raise RefusedError(f"made a prompt of {len(text)} characters")
    return text


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse)
    try:
        return environment.from_string(source)
    except MemoryError:
        raise
    except Exception as error:  # SyntaxError and ValueError of generated code too
        line = getattr(error, "lineno", None)
        where = "" if line is None else f", line {line}"
        raise RefusedError(f"is not valid{where}: {_reason(error)}") from None


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for training: it is rendered as it stands."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 1
        for value, other in ((left, right), (right, left)):
            if isinstance(other, int) and isinstance(value, (str, bytes, list, tuple)):
                size = len(value) * other
        if operator == "**" or size > _MAX_REPEATED:
            raise jinja2.exceptions.SecurityError(f"refused to compute {operator} in a template")
        return super().call_binop(context, operator, left, right)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own, nothing is escaped for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _serve() -> None:
    """Answer requests, lines of JSON, until there are no more or memory was short."""
    limit_memory(_MAX_MEMORY)
    replies = os.fdopen(os.dup(1), "wb")
    replies.write(b"ready\n")
    replies.flush()
    for line in os.fdopen(0, "rb"):  # a program without a console has no sys.stdin
        end_after(_ORPHANED)
        try:
            request = json.loads(line)
            reply = json.dumps({"text": render(request["source"], request["names"])})
        except RefusedError as error:
            reply = json.dumps({"refused": str(error)})
        except MemoryError:
            reply = json.dumps({"limit": f"takes more than {_MAX_MEMORY // 2**20} MiB of memory"})
        replies.write(reply.encode() + b"\n")
        replies.flush()
        if reply.startswith('{"limit"'):
            break
        end_after(0)


if __name__ == "__main__":
    _serve()
