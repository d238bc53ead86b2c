"""Answers obey their grammar, whatever the strength, the sampling and the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from fixture_types import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from amulet_gguf import Amulet, Answer, Settings, Tools
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import SettingError
from amulet_gguf.method.arrays import Float32Array
from amulet_gguf.method.mixture import Mixture
from amulet_gguf.method.sampling import forbid
from amulet_gguf.prompts import grammars
from amulet_gguf.prompts.grammars import Grammars
from amulet_gguf.prompts.planning import Planner

SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"enum": ["yes", "no", None, 3]},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 9},
            "kind": {"enum": ["cat", "dog"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "kind", "age"],
        "additionalProperties": False,
    },
    {
        "$defs": {"leaf": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        "type": "array",
        "prefixItems": [{"$ref": "#/$defs/leaf"}, {"type": "string", "pattern": "^[a-z]{2,5}$"}],
        "items": False,
        "minItems": 2,
    },
    {
        "type": "object",
        "properties": {"when": {"type": "string", "format": "date"}},
        "required": ["when"],
    },
]
LIKED: dict[str, Any] = {"prefer": "concise", "fade": 0, "repeat_penalty": 1}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def amulet(tiny: Tiny, request: pytest.FixtureRequest) -> Iterator[Amulet]:
    with Amulet.load(tiny(request.param), n_ctx=512, n_threads=1) as amulet:
        yield amulet


def rows_of(amulet: Amulet, **options: Any) -> tuple[Answer, list[int]]:
    """Return an answer, and how many rows each step had."""
    context, rows = amulet.engine._sequences.context, []
    decode = context.decode

    def count() -> Any:
        rows.append(whole - context.room)
        return decode()

    def plan(planner: Planner, chosen: Settings) -> Request:
        return planner.request("Hi", None, chosen, n_alternatives=1)

    whole = context.room
    context.decode = count  # type: ignore[method-assign]
    try:
        return amulet.start(plan, Settings(**options)).answer(), rows
    finally:
        del context.decode


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
@pytest.mark.parametrize(
    "options",
    [
        {},
        LIKED | {"strength": 1},
        LIKED | {"strength": 6.65},
        LIKED | {"strength": 300, "plausibility": 0},
        LIKED | {"strength": -5, "temperature": 2.0, "seed": 1},
        {"avoid": "Be dull.", "temperature": 1.0, "top_p": 0.9, "seed": 2, "repeat_penalty": 1.3},
    ],
    ids=["plain", "prompting", "amplified", "far", "away", "avoid"],
)
def test_every_whole_answer_is_valid(
    amulet: Amulet, schema: dict[str, Any], options: dict[str, Any]
) -> None:
    """A random model would write nothing valid by itself."""
    answer = amulet.generate("Hi", schema=schema, max_tokens=160, **options)
    if answer.finish_reason == "length":
        assert schema in ({"type": "object"}, SCHEMAS[0], SCHEMAS[3], SCHEMAS[4])
    else:
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("regex", ["(yes|no), because [a-z]{3,9}\\.", "[0-9]{3}-[0-9]{4}", "é{2}好"])
def test_an_answer_matches_its_regular_expression(amulet: Amulet, regex: str) -> None:
    for n in range(4):
        answer = amulet.generate(
            "Hi", regex=regex, temperature=1.5, seed=n, strength=3, prefer="creative"
        )
        assert re.fullmatch(regex, answer.text)
        assert answer.finish_reason == "stop"


def test_grammars_of_llama_cpp_and_of_lark(amulet: Amulet) -> None:
    gbnf = 'root ::= "a" digit+ "z"\ndigit ::= [0-9]'
    lark = 'start: "a" DIGIT+ "z"\nDIGIT: /[0-9]/'
    for grammar in (gbnf, lark):
        text = amulet.generate("Hi", grammar=grammar, temperature=1.0, seed=3, max_tokens=300).text
        assert re.fullmatch("a[0-9]+(z|$)", text)


def test_an_answer_that_is_cut_off_says_so(amulet: Amulet) -> None:
    answer = amulet.generate("Hi", regex="[a-z]{400}", max_tokens=5)
    assert answer.finish_reason == "length"
    assert re.fullmatch("[a-z]+", answer.text)


def test_what_alone_can_follow_is_not_decoded_for(amulet: Amulet) -> None:
    options = {**LIKED, "strength": 3}
    told = "the sea is wide and nobody knows how deep"
    answer, rows = rows_of(amulet, regex=f"{told}[.!]", **options)
    assert answer.text[:-1] == told
    n = len(amulet.model.tokenize(told))
    assert len([pieces for pieces in answer.pieces if pieces.token is not None]) >= n
    assert len(rows) <= 3  # the prompt, the choice of what ends it
    assert rows[-1] >= 2 * (n - 1)  # and what was forced was read in one go
    certain = [piece.explanation for piece in answer.pieces if piece.explanation is not None]
    assert all(each.probability == 1 for each in certain[: n - 2])


def test_a_forbidden_token_cannot_judge_the_others(tiny: Tiny) -> None:
    """The mask comes before plausibility: it is measured against the best token that may be written."""
    rows: list[Float32Array] = []
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1) as amulet:
        matcher = amulet.planner._grammars.of(Settings(regex="[0-9]{6}"))
        assert matcher is not None
        forbidding, combine = type(matcher).forbid, Mixture.combine

        def keep(self: Any, logits: Float32Array, also: Any) -> None:
            rows.append(logits.copy())
            forbidding(self, logits, also)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(matcher), "forbid", keep)
            answer = amulet.generate(
                "Hi", regex="[0-9]{6}", strength=4, plausibility=0.3, withhold_echo=False,
                protect_facts=False, **LIKED,
            )  # fmt: skip
        assert combine is Mixture.combine
        digits = [i for i in range(amulet.model.n_vocab) if amulet.model.token_bytes(i).isdigit()]
        chosen = [piece.token for piece in answer.pieces if piece.token is not None]
        for logits, token in zip(rows, chosen, strict=True):
            base, liked = logits[:, digits].astype(np.float64)
            x = base + 4 * (liked - base)
            x[liked < liked.max() + np.log(0.3)] = -np.inf
            left = len(answer.text)
            assert left
            assert token == digits[int(x.argmax())]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_mask_is_bit_by_bit(n_vocab: int, n_rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n_rows, n_vocab)).astype(np.float32)
    allowed = random.random(n_vocab) < random.choice([0, 0.1, 0.9, 1])
    bits = np.packbits(np.pad(allowed, (0, -n_vocab % 32)), bitorder="little").view(np.int32)
    expected = np.where(allowed, logits, np.float32(-2e9))
    forbid(logits, bits)
    np.testing.assert_array_equal(logits, expected)


def test_drafts_and_neighbours_change_nothing(amulet: Amulet) -> None:
    options = {
        **LIKED,
        "strength": 3,
        "schema": SCHEMAS[3],
        "max_tokens": 120,
        "temperature": 0.7,
        "seed": 9,
    }
    alone = amulet.generate("Hi", **options)
    drafted = amulet.start(
        lambda planner, s: planner.request("Hi", None, s, draft=alone.text), Settings(**options)
    ).answer()
    assert drafted.text == alone.text
    first, _ = [amulet.stream("Hi", **{**options, "seed": seed}) for seed in (9, 10)]
    assert first.answer().text == alone.text


def test_stop_strings_end_before_the_grammar_does(amulet: Amulet) -> None:
    answer = amulet.generate("Hi", regex="abc def ghi", stop=["def"])
    assert (answer.text, answer.finish_reason) == ("abc ", "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "foo"}}, "Invalid type: foo"),
        (
            {"schema": {"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"type": "x"}]}}}}},
            r"at properties\.a\.items\.anyOf\.1",
        ),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        (
            {
                "schema": {
                    "type": "object",
                    "properties": {"a": {"minimum": 5, "maximum": 3, "type": "integer"}},
                    "required": ["a"],
                }
            },
            r"Unsatisfiable.*at properties\.a\)",
        ),
        ({"regex": "(["}, "unclosed"),
        ({"grammar": "what?"}, "grammar"),
    ],
)
def test_what_is_not_supported_names_the_place(
    tiny: Tiny, amulet: Amulet, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message) as error:
        amulet.generate("Hi", **options)
    assert error.value.field == next(iter(options))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "options", [{"grammar": "root ::= root"}, {"schema": {"$ref": "#"}}, {"regex": r"[^\s\S]"}]
)
def test_what_nobody_can_obey_is_refused(amulet: Amulet, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="nothing can be written that obeys it"):
        amulet.generate("Hi", **options)
    assert amulet.generate("Hi", max_tokens=2).usage.completion_tokens


def chain(n: int, **inner: Any) -> dict[str, Any]:
    """A schema of n references, one within the other."""
    parts = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(n)
    }
    return {"$defs": {**parts, f"d{n}": inner or {"type": "string"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "options",
    [
        {"schema": chain(1000)},  # 75 KB that ended the process: the library follows them on the stack
        {
            "schema": {
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(4000)},
                "$ref": "#/$defs/d0",
            }
        },
        {"grammar": "".join(f'r{i}: "a" r{i + 1}\n' for i in range(4000)) + 'r4000: "a"\nstart: r0'},
        {
            "grammar": "".join(f'r{i} ::= "a" r{i + 1}\n' for i in range(4000))
            + 'r4000 ::= "a"\nroot ::= r0'
        },
    ],
)
def test_what_is_followed_too_deep_is_refused(amulet: Amulet, options: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="300 deep"):
        amulet.generate("Hi", **options)


@pytest.mark.parametrize(
    "spelt", ["#/$defs/d~1{}", "json-schema:///#/$defs/d{}", "#/%24defs/d{}", "#/$defs/d{}"]
)
def test_references_are_counted_however_they_are_spelt(amulet: Amulet, spelt: str) -> None:
    name = "d/{}" if "~1" in spelt else "d{}"
    parts = {name.format(i): {"$ref": spelt.format(i + 1)} for i in range(4000)}
    deep = {"$defs": {**parts, name.format(4000): {"type": "null"}}, "$ref": spelt.format(0)}
    with pytest.raises(SettingError, match="300 deep"):
        amulet.generate("Hi", schema=deep)
    with pytest.raises(SettingError, match="300 deep"):
        amulet.generate("Hi", grammar=f"start: %json {json.dumps(deep)}")
    tool = {
        "function": {
            "name": "f",
            "parameters": {"properties": {"a": {"$ref": spelt.format(0)}}, "$defs": deep["$defs"]},
        }
    }
    with pytest.raises(SettingError, match=r"tools: f: .*300 deep"):
        amulet.generate("Hi", tools=Tools([tool]))


def test_references_may_be_many_and_go_in_circles(amulet: Amulet) -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#"}, "n": {"enum": [1]}}}
    assert amulet.generate("Hi", schema=tree, max_tokens=5).text
    assert amulet.generate("Hi", schema=chain(100), max_tokens=5).text
    wide = {
        "$defs": {f"d{i}": {"enum": [i]} for i in range(900)},
        "anyOf": [{"$ref": f"#/$defs/d{i}"} for i in range(900)],
    }
    assert amulet.generate("Hi", schema=wide, max_tokens=9).text


@pytest.mark.parametrize("schema", [{"type": "foo"}, chain(100, type="bad")])
def test_looking_for_the_place_has_an_end(
    amulet: Amulet, schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "_MAX_SEARCH", 0)
    with pytest.raises(SettingError, match="Invalid type") as error:
        amulet.generate("Hi", schema=schema)
    assert "(at" not in str(error.value) or "the top" in str(error.value)


def test_objects_have_the_properties_that_are_named(tiny: Tiny, amulet: Amulet) -> None:
    """Unless schemas are combined, or the schema says otherwise."""
    grammars = Grammars(amulet.model)
    named = {"properties": {"a": {"type": "null"}}, "required": ["a"], "type": "object"}
    more = {**named, "additionalProperties": True}
    both = {"allOf": [named, {"type": "object", "properties": {"b": {"type": "null"}}}]}

    def takes(schema: dict[str, Any], text: str) -> bool:
        matcher = grammars.of(Settings(schema=schema))
        assert matcher is not None
        tokens = amulet.model.tokenize(text).tolist()
        return bool(matcher.anew()._matcher.validate_tokens(tokens) == len(tokens))

    assert takes(named, '{"a": null}')
    assert not takes(named, '{"a": null, "b": null}')
    assert takes(more, '{"a": null, "b": null}')
    assert takes(both, '{"a": null, "b": null}')
    assert not takes({"items": named, "type": "array"}, '[{"a": null, "c"')
    assert takes({"properties": {"enum": {"type": "null"}}, "type": "object"}, '{"enum": null}')


def test_a_request_can_be_run_again(amulet: Amulet) -> None:
    requests: list[Request] = []

    def plan(planner: Planner, chosen: Settings) -> Request:
        requests.append(requests[0] if requests else planner.request("Hi", None, chosen))
        return replace(requests[0])

    chosen = Settings(regex="[a-z]{5}", repeat_penalty=1)
    assert amulet.start(plan, chosen).answer().text == amulet.start(plan, chosen).answer().text
