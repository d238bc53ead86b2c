"""JSON schemas as programs write them, in the words that a grammar can be made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from amulet_gguf.errors import SettingError

_MAX_DEPTH: Final = 100
_VALUES: Final = frozenset({"enum", "const", "default", "examples", "required"})  # they hold no schemas
#: They hold schemas by names of the program's own.
_BY_NAME: Final = frozenset({
    "properties", "patternProperties", "$defs", "definitions", "dependentSchemas",
})  # fmt: skip
#: Formats that answers are held to.
FORMATS: Final = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
#: What no grammar of tokens can promise.
BEYOND: Final = frozenset({
    "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems", "unevaluatedProperties",
    "propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "not", "if", "then",
    "else",
})  # fmt: skip
#: What a pattern cannot look for: what stands around it, edges of words, what it found before.
_LOOKS: Final = re.compile(r"\(\?<?[=!]|\\[bB1-9]")


def held(schema: Any, field: str, *, is_strict: bool) -> Any:
    """Return a schema without what says nothing to a grammar.

    A `format` is a remark, by the standard, and programs invent their own; `propertyNames` that are
    named or have a pattern are properties.

    Args:
        field: of the request, for errors.
        is_strict: the answer must obey all of it: what cannot be promised stays, to be refused. Else
            that is left to the model, as OpenAI's API leaves it where `strict` is not said.

    Raises:
        SettingError: it is nested too deeply.
    """
    return _held(schema, field, is_strict, _MAX_DEPTH)


def _held(part: Any, field: str, is_strict: bool, n_left: int) -> Any:
    if n_left == 0:
        raise SettingError(f"{field}: a schema is nested more than {_MAX_DEPTH} deep", field)
    if isinstance(part, list):
        return [_held(each, field, is_strict, n_left - 1) for each in part]
    if not isinstance(part, Mapping):
        return part
    found: dict[str, Any] = {}
    for name, value in part.items():
        if name in _VALUES:
            found[name] = value
        elif name in _BY_NAME and isinstance(value, Mapping):
            found[name] = {key: _held(each, field, is_strict, n_left - 1) for key, each in value.items()}
        else:
            found[name] = _held(value, field, is_strict, n_left - 1)
    if isinstance(found.get("format"), str) and found["format"] not in FORMATS:
        del found["format"]
    if found.get("uniqueItems") is False:
        del found["uniqueItems"]
    _name_properties(found)
    looks = isinstance(found.get("pattern"), str) and _LOOKS.search(found["pattern"])
    if looks and ("format" in found or not is_strict):  # zod writes both
        del found["pattern"]
    return found if is_strict else _promised(found)


def _promised(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a schema's own words a grammar can promise."""
    found = {name: part[name] for name in part if name not in BEYOND}
    if "anyOf" not in found and isinstance(found.get("oneOf"), list):
        found["anyOf"] = found.pop("oneOf")
    properties, needed = found.get("properties"), found.get("required")
    needed = needed if isinstance(needed, list) else []
    if isinstance(properties, dict) and not all(name in needed for name in properties):
        found.pop("minProperties", None)
        found.pop("maxProperties", None)
    return found


def _name_properties(part: dict[str, Any]) -> None:
    """Say in other words, in place, what `propertyNames` says of an object that names no properties."""
    names = part.get("propertyNames")
    if not isinstance(names, dict) or {"properties", "patternProperties"} & part.keys():
        return
    said = names.keys() - {"type"}
    value = part.get("additionalProperties", {})
    if said == {"enum"} and isinstance(names["enum"], list):
        part["properties"] = {name: value for name in names["enum"] if isinstance(name, str)}
    elif said == {"pattern"} and isinstance(names["pattern"], str):
        part["patternProperties"] = {names["pattern"]: value}
    elif said:
        return
    del part["propertyNames"]
    if said:
        part["additionalProperties"] = False
