"""The input of a batch: three formats, one meaning, and no line that disturbs another."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.batch.records import (
    RESULT_FIELDS,
    Record,
    dated,
    digest,
    identity,
    read_input,
    read_records,
)
from amulet_gguf.errors import BatchError
from amulet_gguf.llama.cache import CACHE_TYPES
from amulet_gguf.preferences import Preference
from amulet_gguf.settings import Settings

BOM = b"\xef\xbb\xbf"
SETTINGS = Settings(prefer="concise", max_tokens=20)
CONTENT: list[dict[str, Any]] = [
    {"id": "a1", "prompt": "What is rain?"},
    {"id": "a2", "prompt": "Plan,\nin \"Rome\"", "prefer": ["concise", "formal:0.5"], "strength": 3},
    {"id": "a3", "question": "Café ☕?", "temperature": 0.7, "seed": 1, "max_tokens": 200},
    {"id": "a4", "messages": [{"role": "user", "content": "Hi"}], "stop": ["\n\n", "END"], "place": "x"},
    {"id": "a5", "prompt": "42", "withhold_echo": True, "fade": "none", "strength": 2.5},
]  # fmt: skip


def lines(items: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + end for item in items).encode(
        "utf-8", "backslashreplace"
    )


def table(items: list[dict[str, Any]], end: str = "\r\n") -> bytes:
    """The items as CSV: lists as JSON, and what an item lacks as an empty cell."""
    names = list(dict.fromkeys(name for item in items for name in item))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, lineterminator=end)
    writer.writeheader()
    writer.writerows(
        {name: json.dumps(value) if isinstance(value, list) else value for name, value in item.items()}
        for item in items
    )
    return file.getvalue().encode()


def read(data: bytes, *, is_csv: bool = False) -> list[Record]:
    return read_records(data, SETTINGS, is_csv=is_csv)


def only(item: Any) -> Record:
    (record,) = read(lines([item]))
    return record


def meaning(records: list[Record]) -> list[Record]:
    """The records without their places in a file."""
    return [dataclasses.replace(record, line=0) for record in records]


# Formats


def test_a_record_is_what_its_line_says_and_else_what_the_settings_say() -> None:
    first, second, third, fourth, fifth = read(lines(CONTENT))
    assert first == Record(1, SETTINGS, "What is rain?", extra={"id": "a1"})
    assert second.settings.prefer == (Preference("concise"), Preference("formal", 0.5))
    assert (second.settings.strength, second.settings.max_tokens) == (3, 20)
    assert (third.prompt, third.settings.temperature) == ("Café ☕?", 0.7)
    assert (third.settings.seed, third.settings.max_tokens) == (1, 200)
    assert fourth.messages == ({"role": "user", "content": "Hi"},)
    assert fourth.prompt is None
    assert fourth.settings.stop == ("\n\n", "END")
    assert fourth.extra == {"id": "a4", "place": "x"}
    assert (fifth.prompt, fifth.settings.withhold_echo) == ("42", True)
    assert [record.error for record in (first, second, third, fourth, fifth)] == [None] * 5


def test_null_is_absent_and_utf_16_is_read() -> None:
    shared = Settings(strength=3, seed=5, stop="x")
    record = {
        "prompt": "Hi",
        "strength": None,
        "seed": None,
        "stop": None,
        "messages": None,
        "mine": None,
    }
    (found,) = read_records(json.dumps(record).encode("utf-16"), shared)
    assert (found.prompt, found.settings, found.extra) == ("Hi", shared, {"mine": None})
    with pytest.raises(BatchError, match="UTF-8"):
        read_records(b"\xff\xfea", shared)


def test_the_day_is_in_the_key_where_the_template_tells_it() -> None:
    records = read_records(b'{"prompt": "Hi"}\n{"prompt": "Hi", "date": "2020-01-31"}', Settings())
    assert dated(records, "{{ messages }}") == records
    first, second = dated(records, "{{ strftime_now('%d') }}")
    assert first.settings.date is not None
    assert first.key("m") != records[0].key("m")
    assert second == records[1]


def test_records_take_what_clients_send() -> None:
    record = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "Well?"},
        ],
        "prefer": [{"text": "formal", "weight": 0.5}],
        "template_args": {"enable_thinking": False},
        "think": False,
    }
    (found,) = read_records(json.dumps(record).encode(), Settings())
    assert found.error is None
    assert found.settings.prefer[0].weight == 0.5


@pytest.mark.parametrize("bom", [b"", BOM], ids=["", "bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_formats_of_equal_content_give_equal_records(bom: bytes, end: str) -> None:
    expected = meaning(read(lines(CONTENT)))
    assert [record.error for record in expected] == [None] * len(CONTENT)
    blank = lines(CONTENT, end + end)
    spaced = "".join(f" \t{end}{json.dumps(item)}  {end}" for item in CONTENT).encode()
    listed = json.dumps(CONTENT).encode()
    indented = json.dumps(CONTENT, indent=2).replace("\n", end).encode()
    for data in (lines(CONTENT, end), lines(CONTENT, end).rstrip(), blank, spaced, listed, indented):
        assert meaning(read(bom + data)) == expected
    assert meaning(read(bom + table(CONTENT, end), is_csv=True)) == expected


def test_the_line_is_the_place_in_the_input() -> None:
    data = lines(CONTENT[:1]) + b"\n  \n" + lines(CONTENT[2:3], "\r\n") + b"\r\n" + lines(CONTENT[3:4])
    assert [record.line for record in read(data)] == [1, 4, 6]
    assert [record.line for record in read(json.dumps(CONTENT, indent=1).encode())] == [1, 2, 3, 4, 5]
    assert [record.line for record in read(b"prompt\na\n\nb\n", is_csv=True)] == [2, 4]


def test_questions_with_indices_are_read_like_prompts() -> None:
    data = json.dumps([{"index": 7, "question": "Why?"}, {"index": 8, "question": "How?"}])
    assert read(data.encode()) == [
        Record(1, SETTINGS, "Why?", extra={"index": 7}),
        Record(2, SETTINGS, "How?", extra={"index": 8}),
    ]


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"[]", b" [ ] \n"])
def test_nothing_is_no_records(data: bytes) -> None:
    assert read(data) == []
    assert read(b"", is_csv=True) == read(b"prompt\n\n", is_csv=True) == []


def test_the_name_of_a_file_tells_csv(tmp_path: Path) -> None:
    for name in ("a.csv", "b.CSV"):
        (tmp_path / name).write_bytes(table(CONTENT))
        assert meaning(read_input(tmp_path / name, SETTINGS)) == meaning(read(lines(CONTENT)))
    (tmp_path / "c.jsonl").write_bytes(lines(CONTENT))
    assert read_input(tmp_path / "c.jsonl", SETTINGS) == read(lines(CONTENT))
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(BatchError, match="cannot be read"):
            read_input(path, SETTINGS)


def test_a_cell_of_a_text_setting_stays_a_text() -> None:
    """A stop string may look like a number, and a system prompt like a truth value."""
    data = b"prompt,stop,system,prefer\na,1.,true,\nb,,42,\nc,7,1e5,Be brief.\n"
    first, second, third = read(data, is_csv=True)
    assert [record.error for record in (first, second, third)] == [None] * 3
    assert (first.settings.stop, first.settings.system) == (("1.",), "true")
    assert second.settings.system == "42"
    assert (third.settings.stop, third.settings.system) == (("7",), "1e5")


def test_cells_hold_documents() -> None:
    text = "word " * 100_000
    (record,) = read(table([{"prompt": text}]), is_csv=True)
    assert record.prompt == text


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"prompt,id\na,1,2\nb,2\n", "more cells than the header has"),
        (b'prompt,messages\n,"[1,"\nb,\n', "messages begins with ["),
        (b"prompt,max_tokens\na," + b"9" * 5000 + b"\nb,\n", None),
        (b"prompt,strength\na,1e999\nb,\n", "strength must be"),
        (b"prompt,strength\na,nan\nb,\n", "strength must be"),
        (b"prompt,max_tokens\na,2.5\nb,\n", "max_tokens must be"),
        (b"prompt,withhold_echo\na,perhaps\nb,\n", "withhold_echo must be"),
    ],
)
def test_a_bad_row_does_not_disturb_the_next(data: bytes, complaint: str | None) -> None:
    bad, good = read(data, is_csv=True)
    assert bad.line == 2
    assert bad.error is not None
    assert complaint is None or complaint in bad.error
    assert (good.prompt, good.error, good.line) == ("b", None, 3)


@pytest.mark.parametrize(
    ("data", "is_csv", "complaint"),
    [
        (b"[1, 2", False, "not a JSON list"),
        (b'[{"prompt": "a"}] b', False, "not a JSON list"),
        (b"[\xff]", False, "not a JSON list"),
        (b"[" * 100_000, False, "not a JSON list"),
        (b"prompt\n\xff\n", True, "not text in UTF-8"),
    ],
)
def test_an_input_that_is_unreadable_as_a_whole_is_refused(
    data: bytes, is_csv: bool, complaint: str
) -> None:
    with pytest.raises(BatchError, match=complaint) as caught:
        read(data, is_csv=is_csv)
    assert len(str(caught.value).splitlines()) == 1


# Records that cannot be answered

ONE = {"prompt": "x"}
BAD: list[tuple[bytes | Mapping[str, Any], str]] = [
    (b"{", "not JSON"),
    (b"prompt: x", "not JSON"),
    (b'{"prompt": "x"} {"prompt": "y"}', "not JSON"),
    (b'{"prompt": "\xff"}', "not text in UTF-8"),
    (b'{"prompt": "\xed\xa0\x80"}', "not text in UTF-8"),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "x", "meta": ' + b"[" * 100_000 + b"}", "not JSON"),
    (b"[1]", "not an object"),
    (b"1", "not an object"),
    (b"null", "not an object"),
    (b'"How are you?"', "not an object"),
    (b'""', "not an object"),
    (b"{}", "is needed, got 0"),
    ({"id": "a"}, "is needed, got 0"),
    ({"prompt": "x", "question": "y"}, "is needed, got 2"),
    ({"prompt": "x", "messages": []}, "is needed, got 2"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n"}, "the prompt is empty"),
    ({"prompt": None}, ""),
    ({"prompt": 42}, "must be a text"),
    ({"messages": "hi"}, "must be a list"),
    ({"messages": []}, "must end with a message of the user"),
    ({"messages": ["hi"]}, "needs a role and content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role must be"),
    ({"messages": [{"role": "user", "content": 1}]}, "must be a text"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
      "system": "z"}, "system prompt already"),
    ({**ONE, "prefer": "consise"}, "did you mean 'concise'?"),
    ({**ONE, "prefer": ["concise", ""]}, "a preference is empty"),
    ({**ONE, "prefer": [["concise", 11]]}, "from -10 to 10"),
    ({**ONE, "prefer": 3}, "expected preferences"),
    ({**ONE, "prefer": ["formal"] * 9}, "at most 8"),
    ({**ONE, "prefer": {"formal": 0.5}}, "expected preferences"),
    ({**ONE, "strength": "5"}, "strength must be"),
    ({**ONE, "strength": 1001}, "strength must be"),
    ({**ONE, "strength": 1e308}, "strength must be"),
    ({**ONE, "strength": 10**400}, "strength must be"),
    ({**ONE, "strength": float("nan")}, "strength must be"),
    ({**ONE, "strength": float("-inf")}, "strength must be"),
    ({**ONE, "max_tokens": 0}, "max_tokens must be"),
    ({**ONE, "max_tokens": 2.5}, "max_tokens must be"),
    ({**ONE, "max_tokens": True}, "max_tokens must be"),
    ({**ONE, "temperature": -0.1}, "temperature must be"),
    ({**ONE, "seed": 2**64}, "seed must be"),
    ({**ONE, "seed": 1e30}, "seed must be"),
    ({**ONE, "stop": [""]}, "stop: expected texts"),
    ({**ONE, "stop": 3}, "stop must be"),
    ({**ONE, "placement": "top"}, "placement must be"),
    ({**ONE, "fade": "sometimes"}, "fade must be"),
    ({**ONE, "withhold_echo": "no"}, "withhold_echo must be"),
    ({**ONE, "system": ["x"]}, "system must be"),
    ({**ONE, "strenght": 3}, "did you mean 'strength'?"),
    ({**ONE, "max_token": 3}, "did you mean 'max_tokens'?"),
    ({**ONE, "preffer": "formal"}, "did you mean 'prefer'?"),
    ({**ONE, "temprature": 1}, "did you mean 'temperature'?"),
    ({"promt": "x"}, "did you mean 'prompt'?"),
    ({**ONE, "Seed": 1}, "did you mean 'seed'?"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "complaint"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_an_error_with_its_number_and_disturbs_no_other(
    bad: bytes | Mapping[str, Any], complaint: str
) -> None:
    line = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    before, broken, after = read(lines(CONTENT[:1]) + b"\n" + line + b"\n" + lines(CONTENT[2:3]))
    assert broken.line == 3
    assert broken.error is not None
    assert complaint in broken.error
    assert len(broken.error.splitlines()) == 1
    assert (broken.prompt, broken.messages) == (None, None)
    assert [before, after] == [
        dataclasses.replace(record, line=line)
        for record, line in zip(read(lines([CONTENT[0], CONTENT[2]])), (1, 4), strict=True)
    ]
    assert len({record.key("m") for record in (before, broken, after)}) == 3


@pytest.mark.parametrize("depth", [10, 300, 450, 550, 700, 900, 980])
@pytest.mark.parametrize(
    "form",
    ['{"prompt": "x", "meta": %s}', '{"messages": [%s]}', '{"prompt": "x", "stop": [%s]}', "1\n%s"],
)
def test_nesting_of_any_depth_ends_in_a_key_or_an_error(depth: int, form: str) -> None:
    """What JSON can read, all that follows must be able to hash and to write."""
    *_, record = read((form % ("[" * depth + "]" * depth)).encode())
    assert len(record.key("m")) == 16
    assert record.error is not None or json.loads(json.dumps(dict(record.extra))) == record.extra


def test_what_an_error_shows_of_a_line_cannot_steer_a_terminal() -> None:
    (record,) = read(b'{"prompt": \x1b]0;title\x07\x0b')
    assert record.error is not None
    assert not {"\x1b", "\x07", "\x0b"} & set(record.error)


# Other fields


@pytest.mark.parametrize(
    "name",
    ["id", "index", "category", "x", "", "ü", "answer", "meta", "user_id", "name", "source",
     "uid", "_id", "idx", "qid", "question_id", "prompt_id"],
)  # fmt: skip
def test_fields_that_are_nobodys_setting_are_handed_through(name: str) -> None:
    value = {"nested": [1, 2.5, None, "é", "\ud800"]}
    record = only({"prompt": "x", name: value})
    assert record.error is None
    assert record.extra == {name: value}


def test_fields_of_the_result_are_not_handed_through() -> None:
    record = only({"prompt": "x", "id": 1, **dict.fromkeys(RESULT_FIELDS, "forged")})
    assert record == Record(1, SETTINGS, "x", extra={"id": 1})
    record = only({"id": 1, **dict.fromkeys(RESULT_FIELDS, "forged")})
    assert record.error is not None
    assert record.extra == {"id": 1}


# Keys


def test_the_key_is_a_pure_function_of_what_counts() -> None:
    one, other = only(CONTENT[1]), only(dict(reversed(CONTENT[1].items())))
    assert one.key("m") == other.key("m")
    same = [
        {"prompt": "x", "strength": 3, "prefer": "formal:0.5", "stop": "a", "max_tokens": 7},
        {"prompt": "x", "strength": 3.0, "prefer": [["formal", 0.5]], "stop": ["a"], "max_tokens": 7.0},
        {"question": "x", "strength": 3, "prefer": ["formal:0.50"], "stop": ["a"], "max_tokens": 7},
    ]
    assert len({only(item).key("m") for item in same}) == 1
    rows = read(b"prompt,strength,max_tokens\n" + b"x,3,7\n", is_csv=True)
    (line,) = meaning([only({"prompt": "x", "strength": 3.0, "max_tokens": 7})])
    assert meaning(rows)[0].key("m") == line.key("m")


def test_the_key_changes_with_whatever_could_change_the_result() -> None:
    base = {"prompt": "x", "id": 1}
    changed: dict[str, Any] = {
        "prefer": "formal", "avoid": "Be dull.", "strength": 2,
        "plausibility": 0.3, "fade": 5, "fade_to": 3,
        "withhold_echo": False, "protect_facts": False, "placement": "system", "system": "Be.",
        "max_tokens": 21, "stop": "a",
        "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.2,
        "repeat_last_n": 3, "presence_penalty": 1, "frequency_penalty": 1, "logit_bias": {"5": 1},
        "seed": 0, "template_args": {"a": 1}, "date": "2026-01-31",
        "think": True, "think_effort": "low", "think_tokens": 9,
        "align_thoughts": True, "align_tool_calls": True, "min_tokens": 1,
        "schema": {"type": "object"}, "regex": "a", "grammar": 'root ::= "a"',
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Settings)}
    items: list[dict[str, Any]] = [
        base,
        *({**base, name: value} for name, value in changed.items()),
        {**base, "prompt": "y"},
        {**base, "prompt": "x "},
        {**base, "prefer": [["concise", 0.5]]},
        {**base, "id": 2},
        {**base, "id": "1"},
        {**base, "category": None},
        {"messages": [{"role": "user", "content": "x"}], "id": 1},
        {"messages": [{"role": "user", "content": "x", "name": "n"}], "id": 1},
        {"prompt": "", "id": 1},
    ]
    keys = [only(item).key("m") for item in items]
    assert len(set(keys)) == len(keys)
    record = only(base)
    assert record.key("m") != record.key("n")
    assert record.key("m") != read(b"\n" + lines([base]))[0].key("m")


def test_a_model_is_told_by_its_file_and_the_type_of_its_caches(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    assert identity(model) == "m.gguf"
    model.write_bytes(b"GGUF")
    assert identity(model) == identity(model, "f16") == "m.gguf 4"  # of answers before there were others
    assert len({identity(model, name) for name in CACHE_TYPES}) == len(CACHE_TYPES)


def test_a_digest_tells_values_apart_whatever_their_order() -> None:
    values: list[Any] = [
        1,
        "1",
        [1],
        {"a": 1},
        {"a": "1"},
        None,
        "None",
        [],
        {},
        [[]],
        1.5,
        True,
        "\ud800",
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


# Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "question", "messages", "id", "text", "stray"]
    + [field.name for field in dataclasses.fields(Settings)]
)
OBJECTS = st.dictionaries(NAMES, JSON | st.text(min_size=1), max_size=5)
LINES = st.binary(max_size=40) | st.builds(
    lambda item: json.dumps(item).encode(), st.one_of(JSON, OBJECTS)
)


def assert_usable(record: Record) -> None:
    assert len(record.key("m")) == 16
    assert not RESULT_FIELDS & set(record.extra)
    if record.error is None:
        assert (record.prompt is None) != (record.messages is None)
    else:
        assert record.error.strip()
        assert len(record.error.splitlines()) == 1


@given(st.binary() | st.lists(LINES, max_size=4).map(b"\n".join), st.booleans())
def test_whatever_the_bytes_there_are_records_or_one_error(data: bytes, is_csv: bool) -> None:
    try:
        records = read(data, is_csv=is_csv)
    except BatchError:
        return
    for record in records:
        assert_usable(record)
    numbers = [record.line for record in records]
    assert numbers == sorted(set(numbers))


@given(st.lists(LINES, max_size=6))
def test_every_line_that_is_not_blank_is_exactly_one_record(parts: list[bytes]) -> None:
    data = b"x\n" + b"\n".join(parts)  # so that it does not begin with [
    expected = [number for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    assert [record.line for record in read(data)] == expected


@given(st.lists(JSON | OBJECTS, max_size=4))
def test_every_item_of_a_list_is_exactly_one_record(items: list[Any]) -> None:
    records = read(json.dumps(items).encode())
    assert [record.line for record in records] == list(range(1, len(items) + 1))
    for record in records:
        assert_usable(record)
