"""The input of a batch: one record per line of JSON, row of CSV, or item of a JSON list."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from amulet_gguf.errors import AmuletError, BatchError, PromptError, SettingError
from amulet_gguf.home.files import read_file
from amulet_gguf.home.text import as_utf8
from amulet_gguf.prompts.messages import Message, conversation
from amulet_gguf.settings import SETTINGS, Settings

_PROMPTS: Final = ("prompt", "question", "messages")
_KNOWN: Final = frozenset((*SETTINGS, *_PROMPTS))
_IDS: Final = ("id", "index")
_MISSPELT: Final = (*SETTINGS, *_PROMPTS)
_MAX_DEPTH: Final = 100
#: What a record of the output holds; fields of the input with these names are not carried over.
RESULT_FIELDS: Final = frozenset({
    "line", "key", "text", "thought", "error", "finish_reason", "usage", "timings",
})  # fmt: skip
_SHOWN: Final = 60  # characters of a line that an error repeats
#: Of the whole input: all of it is held in memory, several times.
MAX_BYTES: Final = 2**30
_MAX_CELL: Final = 2**31 - 1  # a cell may hold a document; the module's own limit is 128 KB


@dataclass(frozen=True)
class Record:
    """One prompt of a batch.

    Attributes:
        line: where it stands in the input, from 1: line of the file, or item of a JSON list.
        settings: the batch's, changed by what the record says.
        prompt, messages: one of the two.
        extra: the other fields of the record ("id" among them), which its result will carry too.
        error: why it cannot be answered, or None.
    """

    line: int
    settings: Settings = field(default_factory=Settings)
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def key(self, model: str) -> str:
        """Return 16 hex digits that change with whatever could change the answer, or its result."""
        return digest(dataclasses.asdict(self) | {"model": model})


def identity(model: Path, cache_type: str = "f16") -> str:
    """Return what tells a model file and the type of its caches from others, without reading it."""
    try:
        name = f"{model.name} {model.stat().st_size}"
    except OSError:
        name = model.name  # loading it will say what is wrong
    return name if cache_type == "f16" else f"{name} {cache_type}"  # as before there were others


def digest(content: Any) -> str:
    """Return 16 hex digits that tell JSON values apart."""
    text = json.dumps(content, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(data: bytes, settings: Settings, *, is_csv: bool = False) -> list[Record]:
    """Read the input of a batch; a record that is not valid carries its error.

    Args:
        data: lines of JSON objects, a JSON list of objects, or CSV with a header, in UTF-8. A record
            has "prompt" (or "question"), perhaps with "prefill", or "messages", and may have "id" (or
            "index"), any field of
            `Settings`, and others, which are handed through; one that is null is absent. In CSV, empty
            cells are absent fields and cells that begin with [ are JSON.
        settings: for what records leave out.

    Raises:
        BatchError: the input as a whole cannot be read.
    """
    try:
        data = as_utf8(data)
    except UnicodeError:
        raise BatchError("the input is not text in UTF-8: save it as such") from None
    if is_csv:
        items = _csv_items(data)
    elif data.lstrip()[:1] == b"[":
        items = _list_items(data)
    else:
        items = _line_items(data)
    return [
        Record(line, error=str(item)) if isinstance(item, _Bad) else _record(line, item, settings)
        for line, item in items
    ]


def dated(records: list[Record], chat_template: str | None) -> list[Record]:
    """Return records that all take the same day for today, if the chat template tells it: then their
    keys do, too."""
    if "strftime_now" not in (chat_template or ""):
        return list(records)
    today = datetime.date.today().isoformat()
    return [
        dataclasses.replace(each, settings=each.settings.replace(date=each.settings.date or today))
        for each in records
    ]


def read_input(path: Path, settings: Settings) -> list[Record]:
    """Read a file as `read_records`; one whose name ends in .csv is CSV.

    Raises:
        BatchError: it cannot be read.
    """
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from None
    return read_records(data, settings, is_csv=path.suffix.lower() == ".csv")


class _Bad(str):
    """Why an item of the input could not be read."""


def _shown(text: str) -> str:
    """Return the beginning of a text, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_SHOWN])


def _is_deep(value: Any) -> bool:
    """Tell whether lists and objects are nested deeper than what follows can hash and write."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _decoded(line: bytes) -> Any:
    return json.loads(line.decode())


def _line_items(data: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, _decoded(line)
        except UnicodeDecodeError:
            yield number, _Bad("not text in UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, _Bad(f"not JSON ({error}): {_shown(line.strip().decode('utf-8', 'replace'))}")


def _list_items(data: bytes) -> Iterator[tuple[int, Any]]:
    try:
        items = _decoded(data)
    except (ValueError, RecursionError) as error:
        raise BatchError(f"the input begins with [ and is not a JSON list: {error}") from None
    yield from enumerate(items, 1)


def _csv_items(data: bytes) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_MAX_CELL)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BatchError("the input is not text in UTF-8") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            if None in row:
                yield rows.line_num, _Bad("more cells than the header has")
                continue
            try:
                yield rows.line_num, {name: _cell(name, cell) for name, cell in row.items() if cell}
            except ValueError as error:
                yield rows.line_num, _Bad(str(error))
    except csv.Error as error:
        raise BatchError(f"the input is not CSV, line {rows.line_num}: {error}") from None


def _cell(name: str, cell: str) -> Any:
    if name in SETTINGS:
        return SETTINGS[name].parse(name, cell)
    if name == "messages" and cell.lstrip()[:1] == "[":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} begins with [ and is not a JSON list: {error}") from None
    return cell


def _record(line: int, item: Any, settings: Settings) -> Record:
    """Return the record that a parsed item describes."""
    if not isinstance(item, dict) and not _is_deep(item):
        return Record(line, error=f"not an object with a prompt: {_shown(json.dumps(item))}")
    if _is_deep(item):
        return Record(line, error=f"nested more than {_MAX_DEPTH} deep")
    item = {name: value for name, value in item.items() if value is not None or name not in _KNOWN}
    extra = {
        name: value
        for name, value in item.items()
        if name not in SETTINGS and name not in _PROMPTS and name not in RESULT_FIELDS
    }
    try:
        for name in extra:
            near = difflib.get_close_matches(name, _MISSPELT, n=1, cutoff=0.8)
            near += [known for known in _MISSPELT if name.lower() == known]
            if near and not name.endswith("id"):
                raise SettingError(f"unknown field {name!r}; did you mean {near[0]!r}?")
        if "chat_template_kwargs" in item:
            raise SettingError("chat_template_kwargs is template_args here")
        prefill = extra.pop("prefill", None)
        given = [name for name in _PROMPTS if name in item]
        if len(given) != 1:
            raise PromptError(f"one of {', '.join(_PROMPTS)} is needed, got {len(given)}")
        prompt = messages = None
        if given == ["messages"]:
            if not isinstance(item["messages"], list):
                raise PromptError("messages must be a list")
            messages = tuple(item["messages"])
        else:
            prompt = item[given[0]]
            if prefill is not None:
                question = {"role": "user", "content": prompt}
                prompt, messages = None, (question, {"role": "assistant", "content": prefill})
        changes = {name: _plain(name, item[name]) for name in SETTINGS if name in item}
        changed = dataclasses.replace(settings, **changes)
        conversation(prompt, messages, changed.system)
    except AmuletError as error:
        return Record(line, extra=extra, error=str(error))
    return Record(line, changed, prompt, messages, extra)


def _plain(name: str, value: Any) -> Any:
    """Return a JSON value as `Settings` takes it: 3.0 is how some writers spell whole numbers."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole and SETTINGS[name].kind == "whole" else value
