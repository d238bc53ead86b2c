"""Answers that obey a JSON schema, a regular expression or a grammar, token by token (llguidance)."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np

from amulet_gguf.errors import EngineError, SettingError
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Float32Array
from amulet_gguf.method.sampling import forbid
from amulet_gguf.settings import Settings

#: White space between the parts of JSON. Without an end, it is where small models get lost.
_WHITE_SPACE: Final = r"( ?|\n {0,32})"
_DEFINITIONS: Final = ("$defs", "definitions")
_VALUES: Final = ("enum", "const", "default", "examples", "required")  # they hold no schemas
#: What combines schemas, and what does so beside properties.
_MERGING: Final = frozenset({
    "allOf", "if", "not", "dependentSchemas", "unevaluatedProperties", "patternProperties",
})  # fmt: skip
_CHOICES: Final = frozenset({"anyOf", "oneOf", "$ref"})
_MAX_SEARCHED: Final = 256  # parts of a schema that are compiled to find the one at fault
_MAX_SEARCH: Final = 0.3  # seconds of that: whoever else wants something planned waits
#: References within references, or rules of a grammar: the library follows them on the stack.
_MAX_DEPTH: Final = 300
_TOO_DEEP: Final = f"it refers or nests more than {_MAX_DEPTH} deep, or has too many rules"
_MAX_VISITS: Final = 50_000  # parts that are looked at for that
_RULE: Final = re.compile(r"^\s*[\w?!@.-]+\s*(?:::=|:)", re.MULTILINE)


class Matcher:
    """Follows one answer (see `amulet_gguf.engine.request.Grammar`)."""

    def __init__(self, matcher: Any, model: Model) -> None:
        self._matcher = matcher
        self._model = model
        self._allowed = np.zeros((model.n_vocab + 31) // 32, np.int32)

    def anew(self) -> Matcher:
        """Return one for an answer of which nothing was written."""
        return Matcher(self._matcher.deep_copy(), self._model)

    def forced(self) -> Sequence[int]:
        """Return the tokens that alone can come next."""
        found: list[int] = self._matcher.compute_ff_tokens()
        return found

    def forbid(self, logits: Float32Array, also: Sequence[int]) -> None:
        """Rule out what cannot come next in (N, V) logits, in place, but for the tokens `also`.

        Raises:
            EngineError: the grammar is too complex to go on.
        """
        self._matcher.unsafe_compute_mask_ptr(self._allowed.ctypes.data, self._allowed.nbytes)
        self._check()
        for token in also:
            self._allowed[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
        forbid(logits, self._allowed)

    def accepts(self, token: int) -> bool:
        """Tell whether a token can come next."""
        return bool(self._matcher.validate_tokens([token]) == 1)

    def push(self, token: int, data: bytes) -> bool:
        """Take a token, of which `data` belongs to the answer; return whether nothing can follow.

        Raises:
            EngineError: it cannot stand here: a mark of a thought had to be told apart from it.
        """
        if data == self._model.token_bytes(token):
            self._matcher.consume_token(token)
        else:
            self._matcher.consume_tokens(self._model.tokenize(data.decode("utf-8", "replace")).tolist())
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            error = _line(self._matcher.get_error())
            if error.startswith("NoExtension"):
                error = "nothing can be written that obeys it"
            raise EngineError(f"the grammar of the answer: {error}")


class Grammars:
    """Compiles the grammars of answers for the vocabulary of a model, which takes a second once."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._compiled = lru_cache(maxsize=64)(self._compile)

    def of(self, settings: Settings) -> Matcher | None:
        """Return the grammar that settings ask for; None: none.

        Raises:
            SettingError: it is not valid or not supported; of a schema it names the place.
        """
        for name in ("schema", "regex", "grammar"):
            text = getattr(settings, name)
            if text is not None:
                return self._compiled(name, text)
        return None

    def of_calls(self, lark: str, schemas: Mapping[str, Any]) -> Matcher:
        """Return the grammar of calls of functions.

        Args:
            schemas: that it was made of, by the names of the functions.

        Raises:
            SettingError: the schema of one of them is not valid or not supported.
        """
        for name, schema in schemas.items():
            if _is_schema_too_deep(schema):
                raise SettingError(f"tools: {name}: {_TOO_DEEP}", "tools")
        try:
            return self._compiled("lark", lark)
        except SettingError as error:
            wrong = (self._error_in(name, schema) for name, schema in schemas.items())
            raise SettingError(f"tools: {next(filter(None, wrong), error)}", "tools") from None

    def _error_in(self, name: str, schema: Any) -> str:
        """Return what is wrong with the schema of a function, "" for nothing."""
        try:
            self._compile("schema", json.dumps(schema))
        except SettingError as error:
            return f"{name}: {error}"
        return ""

    def _compile(self, name: str, text: str) -> Matcher:
        matcher, error = self._tried(name, text)
        if error and name == "schema":
            place = _place(json.loads(text), lambda part: self._tried(name, part)[1])
            error += f" (at {place})" if place else ""
        if not error:
            first = matcher.deep_copy()
            first.compute_bitmask()
            if first.is_error():
                error = "nothing can be written that obeys it, or it is too complex"
        if error:
            raise SettingError(f"{name}: {error}", name)
        return Matcher(matcher, self._model)

    def _tried(self, name: str, text: str) -> tuple[Any, str]:
        """Return a matcher, and what is wrong with it, "" for nothing."""
        from llguidance import LLMatcher, LLParserLimits, grammar_from

        if _is_too_deep(name, text):
            return None, _TOO_DEEP
        # A step of an answer makes others wait.
        limits = LLParserLimits(step_max_items=10_000, verbose_errors=False)
        try:
            if name == "schema":
                options: Any = {"whitespace_pattern": _WHITE_SPACE}
                schema = json.dumps(closed(json.loads(text)))
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
            elif name == "lark":
                grammar = LLMatcher.grammar_from_lark(text)
            elif name == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = grammar_from("gbnf", text)  # Lark's, too
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        except (ValueError, RuntimeError, RecursionError) as error:
            return None, _line(str(error))
        return matcher, _line(matcher.get_error())

    @cached_property
    def _tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer: Any = _Tokenizer(self._model)
        return LLTokenizer(TokenizerWrapper(tokenizer), eos_token=tokenizer.ends)


class _Tokenizer:
    """A model's vocabulary as llguidance wants it: control tokens have no bytes, so none is allowed."""

    bos_token_id = None

    def __init__(self, model: Model) -> None:
        self._model = model
        self.tokens = [model.token_bytes(token) for token in range(model.n_vocab)]
        self.special_token_ids = [token for token, data in enumerate(self.tokens) if not data]
        self.ends = model.end_tokens.tolist()
        self.eos_token_id = model.eos

    def __call__(self, text: bytes) -> list[int]:
        found: list[int] = self._model.tokenize(text.decode("utf-8", "replace")).tolist()
        return found


def _is_too_deep(name: str, text: str) -> bool:
    """Tell whether the library might follow a grammar deeper than its stack reaches: along the rules of
    one, or along what is nested in a schema and what that refers to."""
    if name == "schema":
        return _is_schema_too_deep(json.loads(text))
    return name == "grammar" and len(_RULE.findall(text)) + text.count("$ref") > _MAX_DEPTH


def _is_schema_too_deep(root: Any) -> bool:
    known: dict[
        str, int
    ] = {}  # where a reference was followed from; from less deep, nothing new is found
    n_left, n_others = _MAX_VISITS, 0
    waiting = [(root, 0)]
    while waiting:
        part, depth = waiting.pop()
        n_left -= 1
        if depth > _MAX_DEPTH or n_left < 0:
            return True
        if not isinstance(part, dict):
            continue
        waiting += [(child, depth + 1) for _, child in _parts(part)]
        reference = part.get("$ref")
        if not isinstance(reference, str) or reference == "#" or known.get(reference, -1) >= depth:
            continue
        known[reference] = depth
        target = root
        for step in reference.removeprefix("#/").split("/"):
            target = target.get(step) if isinstance(target, dict) else None
        if target is None:  # spelt in a way that is not looked into here
            n_others += 1
        waiting.append((target, depth + 1))
    return n_others > _MAX_DEPTH


def _place(schema: Any, error_in: Callable[[str], str]) -> str:
    """Return where a schema that does not compile goes wrong, as a path of names; "" if it takes too
    long to find."""
    end = time.monotonic() + _MAX_SEARCH
    shared = {name: schema[name] for name in _DEFINITIONS if name in schema}
    path: list[str] = []
    n_left, part = _MAX_SEARCHED, schema
    is_found = False
    while not is_found:
        is_found = True
        for steps, child in _parts(part):
            n_left -= 1
            if n_left < 0 or time.monotonic() > end:
                return ""
            if isinstance(child, dict) and error_in(json.dumps({**shared, **child})):
                path += steps
                part, is_found = child, False
                break
    return _shortened(".".join(path)) or "the top"


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}…{path[-99:]}"


def closed(schema: Any) -> Any:
    """Return a schema whose objects have no other properties than it names, where it leaves that open.

    It allows others, but those who write one rarely mean that, and small models do not stop. llama.cpp
    reads schemas so, too. Where schemas are combined, each must leave room for the others' properties.
    """
    if any(_MERGING.intersection(part) or ("properties" in part and _CHOICES.intersection(part))
           for part in _all_parts(schema)):  # fmt: skip
        return schema
    schema = copy.deepcopy(schema)
    for part in _all_parts(schema):
        if isinstance(part.get("properties"), dict):
            part.setdefault("additionalProperties", False)
    return schema


def _all_parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield a schema and all within it that are objects."""
    if isinstance(schema, dict):
        yield schema
        for _, part in _parts(schema):
            yield from _all_parts(part)


def _parts(schema: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the schemas within one, each with the names that lead to it."""
    for name, value in schema.items():
        if name in _VALUES:
            continue
        if name in ("properties", "patternProperties") and isinstance(value, dict):
            yield from (((name, key), each) for key, each in value.items())
        elif isinstance(value, list):
            yield from (((name, str(i)), each) for i, each in enumerate(value))
        elif isinstance(value, dict) and name not in _DEFINITIONS:
            yield (name,), value
    for name in _DEFINITIONS:
        if isinstance(schema.get(name), dict):
            yield from (((name, key), each) for key, each in schema[name].items())


def _line(message: str) -> str:
    """Return an error of several lines as one, without what is for those who mend the library."""
    for mark in ("<state>", "<backtrace>"):
        message = message.partition(mark)[0]
    return " ".join(message.split())[:300]
