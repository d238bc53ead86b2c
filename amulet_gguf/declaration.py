"""How a setting is declared, once: a field with its help, kind and range.

The options of the command line and of `llm`, `/set`, profiles, records and columns of a batch, methods
of an evaluation, requests to the server, and the checks of all of them are read off the declarations
in `amulet_gguf.settings` and `amulet_gguf.llama.loading`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from amulet_gguf.errors import SettingError, shown
from amulet_gguf.preferences import as_preferences

Kind: TypeAlias = Literal[
    "number",
    "whole",
    "switch",
    "choice",
    "text",
    "texts",
    "path",
    "preferences",
    "biases",
    "arguments",
    "schema",
]
#: Kinds of which several values may be given, one at a time.
SEVERAL: Final = ("texts", "preferences", "biases", "arguments")
_SWITCH: Final = {
    "true": True, "on": True, "yes": True, "false": False, "off": False, "no": False,
}  # fmt: skip


_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_MAX_ARGUMENTS: Final = 65_536  # characters
_MAX_SCHEMA: Final = 262_144  # characters
_ID: Final = re.compile(r"[0-9]{1,10}")
_MAX_TEXTS: Final = 16_384  # characters; each token is compared with all of them
_TYPES: Final[dict[Kind, tuple[type, ...]]] = {
    "number": (int, float),
    "whole": (int,),
    "switch": (bool,),
    "text": (str,),
    "path": (str, os.PathLike),
}


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting.

    Attributes:
        help: what it is, in a sentence for people.
        kind: of its values.
        default: its value where nobody says one; None where that means something else than a value.
        low, high: of a number, both included.
        choices: of a choice.
        flag: a short option of the command line, such as "-s".
        off: the option that turns a switch off.
        metavar: of its values in help.
        otherwise: the default in words, where the value does not say it.
        words: that may stand for values, such as "auto".
    """

    help: str
    kind: Kind = "number"
    default: Any = None
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    flag: str = ""
    off: str = ""
    metavar: str = ""
    otherwise: str = ""
    words: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_number(self) -> bool:
        return self.kind in ("number", "whole")

    def parse(self, name: str, text: str) -> Any:
        """Return the value that a line of text writes: 3, none, on, TEXT, a JSON list or object.

        Raises:
            SettingError: there is no number where one is needed, or no JSON behind a bracket.
        """
        if text.lower() in self.words:
            return self.words[text.lower()]
        if self.default is None and text.lower() in ("none", "null"):
            return None
        if self.is_number:
            return self._number(name, text)
        if self.kind == "switch":
            return _SWITCH.get(text.lower(), text)
        if self.kind in SEVERAL:
            if text.lower() == "none":
                return ()
            if text.lstrip()[:1] in ("[", "{"):
                try:
                    return json.loads(text)
                except (ValueError, RecursionError) as error:
                    if self.kind != "texts":  # they may well begin so
                        raise SettingError(f"{name} is not valid JSON: {error}", name) from None
            return [text]
        return text

    def _number(self, name: str, text: str) -> float | int:
        try:
            return int(text)
        except ValueError:
            pass
        try:
            return float(text)
        except ValueError:
            raise self.refused(name, text) from None

    def refused(self, name: str, value: Any) -> SettingError:
        """Return the error of a value that is not possible."""
        if self.is_number:
            kind = "whole number" if self.kind == "whole" else "number"
            expected = f"a {kind} from {self.low} to {self.high}"
            expected += "".join(f", or {word}" for word in self.words)
        elif self.kind == "switch":
            expected = "true or false" + (" or None" if self.default is None else "")
        elif self.kind == "choice":
            expected = f"one of {', '.join(self.choices)}"
        else:
            expected = "a text" + (" or None" if self.default is None else "")
        return SettingError(f"{name} must be {expected}, got {shown(value)}", name)

    def checked(self, name: str, value: Any) -> Any:
        """Return a value in the one form that is kept.

        Raises:
            SettingError: it is not possible.
        """
        if isinstance(value, str) and value in self.words:
            value = self.words[value]
        if value is None and self.default is None:
            return None
        if self.kind == "preferences":
            return as_preferences(value)
        if self.kind == "biases":
            return as_biases(name, value, self.low, self.high)
        if self.kind == "arguments":
            return as_arguments(name, value)
        if self.kind == "schema":
            return as_schema(name, value)
        if self.kind == "texts":
            return _as_texts(name, value)
        if self.is_number:
            is_good = isinstance(value, _TYPES[self.kind]) and not isinstance(value, bool)
            is_good = is_good and self.low <= value <= self.high
        elif self.kind == "choice":
            is_good = isinstance(value, str) and value in self.choices
        else:
            is_good = isinstance(value, _TYPES[self.kind])
        if not is_good:
            raise self.refused(name, value)
        return float(value) if self.kind == "number" else value


def setting(default: Any, help: str, kind: Kind = "number", **more: Any) -> Any:
    """Declare a setting as a field of a dataclass; the arguments are those of `Setting`."""
    declared = Setting(help, kind, default, **more)
    return dataclasses.field(default=default, metadata={"setting": declared})


class Declared:
    """Base of a frozen dataclass whose fields are settings: they are checked when they are set."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, each in declared(kind).items():
            object.__setattr__(self, name, each.checked(name, getattr(self, name)))


@functools.cache
def declared(kind: Any) -> Mapping[str, Setting]:
    """Return the declarations of a class's fields, by name."""
    return {each.name: each.metadata["setting"] for each in dataclasses.fields(kind)}


def whole(name: str, value: int, low: int, high: int) -> int:
    """Return an argument that is a whole number.

    Raises:
        SettingError: it is none, or out of its range.
    """
    checked: int = Setting("", "whole", 0, low=low, high=high).checked(name, value)
    return checked


def check_callable(name: str, value: object) -> None:
    """See whether something can be called, or is None.

    Raises:
        SettingError: it is neither.
    """
    if value is not None and not callable(value):
        raise SettingError(f"{name} must be a function or None, got {shown(value)}", name)


def find(name: str, known: Mapping[str, Setting]) -> Setting:
    """Return a declaration.

    Raises:
        SettingError: there is none of the name; it says which is near.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    raise SettingError(f"there is no setting {name!r}{hint}", name)


def _as_texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise SettingError(f"{name} must be a text or several, got {shown(value)}", name)
    texts = (value,) if isinstance(value, str) else tuple(value)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise SettingError(f"{name}: expected texts that are not empty, got {shown(text)}", name)
    if sum(map(len, texts)) > _MAX_TEXTS:
        raise SettingError(f"{name}: at most {_MAX_TEXTS} characters in all", name)
    return texts


def as_schema(name: str, value: Any) -> str:
    """Return a JSON schema in one form: JSON, in one line.

    Args:
        value: a mapping, JSON of one, or a pydantic model.
    """
    described = getattr(value, "model_json_schema", None)
    if described is not None:
        value = described()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{name} is not valid JSON: {error}", name) from None
    if not isinstance(value, Mapping):
        raise SettingError(f"{name} must be a JSON schema, an object, got {shown(value)}", name)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise SettingError(f"{name} holds what is not JSON", name) from None
    if len(text) > _MAX_SCHEMA:
        raise SettingError(f"{name}: at most {_MAX_SCHEMA} characters", name)
    return text


def as_biases(name: str, value: Any, low: float, high: float) -> tuple[tuple[int | str, float], ...]:
    """Return biases of tokens in one form: (token id or text, number) pairs.

    Args:
        value: a mapping or pairs of these, or texts as TOKEN:BIAS. A text of digits is an id, as in
            JSON, where no key is a number.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping):
        value = value.items()
    if not isinstance(value, Iterable):
        raise SettingError(f"{name} must give numbers to token ids or texts, got {shown(value)}", name)
    biases = []
    for item in value:
        token, bias = _pair(name, item)
        if isinstance(token, str) and _ID.fullmatch(token):
            token = int(token)
        is_id = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31
        if not is_id and not (isinstance(token, str) and token):
            raise SettingError(f"{name}: {shown(token)} is neither the id of a token nor a text", name)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not low <= bias <= high:
            message = f"{name} of {token!r} must be a number from {low} to {high}, got {shown(bias)}"
            raise SettingError(message, name)
        biases.append((token, float(bias)))
    return tuple(biases)


def _pair(name: str, item: Any) -> tuple[Any, Any]:
    if isinstance(item, str):
        token, _, bias = item.rpartition(":")
        try:
            return token, float(bias)
        except ValueError:
            raise SettingError(f"{name}: expected TOKEN:BIAS, got {shown(item)}", name) from None
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    raise SettingError(f"{name}: expected a token and its bias, got {shown(item)}", name)


def as_arguments(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Return values by name in one form: (name, JSON) pairs, by their names, the last of each.

    Args:
        value: a mapping to JSON values, or (name, value) pairs or texts as NAME=VALUE, whose values are
            JSON if they can be read as such, and else texts.
    """
    if value is None:
        return ()
    items: Iterable[Any] = [value] if isinstance(value, str) else value
    if isinstance(value, Mapping):
        items = (
            (key, json.dumps(each) if isinstance(each, str) else each) for key, each in value.items()
        )
    elif not isinstance(value, Iterable):
        raise SettingError(f"{name} must give values to names, got {shown(value)}", name)
    found: dict[str, str] = {}
    for item in items:
        key, text = _argument(name, item)
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise SettingError(f"{name}: {shown(key)} is no name", name)
        if isinstance(text, str):
            with contextlib.suppress(ValueError, RecursionError):
                text = json.loads(text)
        try:
            found[key] = json.dumps(text, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise SettingError(f"{name}: the value of {key} is not JSON: {shown(text)}", name) from None
    if sum(map(len, found.values())) > _MAX_ARGUMENTS:
        raise SettingError(f"{name}: at most {_MAX_ARGUMENTS} characters in all", name)
    return tuple(sorted(found.items()))


def _argument(name: str, item: Any) -> tuple[Any, Any]:
    if isinstance(item, str):
        key, equals, text = item.partition("=")
        if not equals:
            raise SettingError(f"{name}: expected NAME=VALUE, got {shown(item)}", name)
        return key, text
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    raise SettingError(f"{name}: expected a name and its value, got {shown(item)}", name)
