"""Chat templates in a sandbox: messages become text, as the template of a model file says.

The template comes with the file and is not trusted: it runs without access to Python's internals, for at
most two seconds, and cannot ask for huge strings by multiplication. It finds there what transformers has
for it: loop controls, `generation` blocks, `tojson`, `raise_exception`, `strftime_now`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from amulet_gguf.errors import PromptError

#: Characters of a template; real ones have a tenth of it.
MAX_TEMPLATE: Final = 262_144
_MAX_REPEATED: Final = 100_000  # items or characters of "x" * n in a template
_MAX_SECONDS: Final = 2.0  # a template works for milliseconds


class TimeUpError(PromptError):
    """A template took too long."""


class Renderer:
    """A chat template, ready to render conversations."""

    def __init__(self, source: str) -> None:
        """Compile a template.

        Raises:
            PromptError: it is not valid.
        """
        if len(source) > MAX_TEMPLATE:
            raise PromptError(f"the chat template is too long: {len(source)} characters")
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # SyntaxError and ValueError of generated code too
            line = getattr(error, "lineno", None)
            where = "" if line is None else f", line {line}"
            raise PromptError(f"the chat template is not valid{where}: {_reason(error)}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], now: datetime, arguments: Mapping[str, Any]
    ) -> str:
        """Return the text of a conversation, up to where the assistant is to speak.

        Args:
            now: what the template takes for the present.
            arguments: names that the template finds.

        Raises:
            PromptError: the template refuses the conversation, fails, or takes too long.
        """
        known = {
            **arguments,
            "strftime_now": now.strftime,
            "add_generation_prompt": True,
            "messages": messages,
        }
        try:
            return self._render({"tools": None, "documents": None, **known})
        except TimeUpError:
            raise
        except PromptError as error:  # transformers has them so, but some look for what is defined
            try:
                return self._render(known)
            except TimeUpError:
                raise
            except PromptError:
                raise error from None

    def _render(self, known: Mapping[str, Any]) -> str:
        outer = sys.gettrace()
        sys.settrace(_time_limit())
        try:
            return self._template.render(known)
        except TimeoutError as error:
            raise TimeUpError(f"the chat template failed: {error}") from None
        except Exception as error:  # whatever a template can make Python raise
            raise PromptError(f"the chat template failed: {_reason(error)}") from None
        finally:
            sys.settrace(outer)


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


def _time_limit() -> Any:
    """Return a trace function that ends what it traces when its time is over."""
    deadline = time.monotonic() + _MAX_SECONDS

    def trace(_frame: FrameType, _event: str, _arg: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it took more than {_MAX_SECONDS:g} seconds")
        return trace

    return trace


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
