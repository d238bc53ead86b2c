"""Every setting works in every face, with the same meaning: that is what one declaration is for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from command_lines import chosen

from amulet_gguf import llm_plugin
from amulet_gguf.batch.records import read_records
from amulet_gguf.cli import slash
from amulet_gguf.cli.options import settings_options
from amulet_gguf.declaration import SEVERAL
from amulet_gguf.home.config import load_config
from amulet_gguf.llama.loading import LOADING, Loading
from amulet_gguf.methods import method
from amulet_gguf.server.schema import ChatRequest
from amulet_gguf.settings import SETTINGS, Settings

#: For each setting a value, as JSON has it, and how it is typed.
SAMPLES: dict[str, tuple[Any, str]] = {
    "prefer": (["formal:0.5"], "formal:0.5"),
    "avoid": ("Be dull.", "Be dull."),
    "strength": (3.5, "3.5"),
    "fade": (7.5, "7.5"),
    "fade_to": (1.5, "1.5"),
    "plausibility": (0.25, "0.25"),
    "withhold_echo": (False, "false"),
    "protect_facts": (False, "false"),
    "placement": ("system", "system"),
    "system": ("Be brief.", "Be brief."),
    "max_tokens": (7, "7"),
    "min_tokens": (3, "3"),
    "stop": (["END"], "END"),
    "temperature": (0.5, "0.5"),
    "top_k": (5, "5"),
    "top_p": (0.5, "0.5"),
    "min_p": (0.125, "0.125"),
    "repeat_penalty": (1.5, "1.5"),
    "repeat_last_n": (3, "3"),
    "presence_penalty": (0.5, "0.5"),
    "frequency_penalty": (-0.5, "-0.5"),
    "logit_bias": ({"42": -100, "sea": 2.5}, '{"42": -100, "sea": 2.5}'),
    "seed": (1, "1"),
    "template_args": (
        {"enable_thinking": False, "date": "May"},
        '{"enable_thinking": false, "date": "May"}',
    ),
    "date": ("2026-01-31", "2026-01-31"),
    "think": (False, "false"),
    "think_effort": ("low", "low"),
    "think_tokens": (9, "9"),
    "align_thoughts": (True, "true"),
    "align_tool_calls": (True, "true"),
    "schema": ({"type": "array", "maxItems": 3}, '{"type": "array", "maxItems": 3}'),
    "regex": ("[a-z]{3,7}", "[a-z]{3,7}"),
    "grammar": ('root ::= "a" | "b"', 'root ::= "a" | "b"'),
}


def expected(name: str) -> Settings:
    return Settings(**{name: SAMPLES[name][0]})


def typed(name: str) -> list[str]:
    """The sample on the command line."""
    value = SAMPLES[name][0]
    option = f"--{name.replace('_', '-')}"
    if SETTINGS[name].kind == "switch":
        return [option if value else SETTINGS[name].off]
    if name == "template_args":
        return ["--template-arg", "enable_thinking=false", "--template-args", "date=May"]
    if isinstance(value, dict) and name != "schema":
        return [word for token, bias in value.items() for word in (option, f"{token}:{bias}")]
    return [option, SAMPLES[name][1]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    return tmp_path


every_setting = pytest.mark.parametrize("name", list(SETTINGS))


def test_every_setting_has_a_sample() -> None:
    assert list(SAMPLES) == list(SETTINGS)
    assert all(expected(name) != Settings() for name in SAMPLES)


@every_setting
def test_the_command_line(name: str) -> None:
    assert chosen(*typed(name))[0] == expected(name)
    help = CliRunner().invoke(click.command()(settings_options(lambda: None)), ["--help"]).stdout
    assert typed(name)[0] in help


@every_setting
def test_profiles(name: str, home: Path) -> None:
    from amulet_gguf.cli import main

    added = CliRunner().invoke(main, ["profiles", "add", "p", *typed(name)])
    assert added.exit_code == 0, added.output
    assert load_config().settings("p", Settings()) == expected(name)
    assert chosen("--profile", "p")[0] == expected(name)


@every_setting
def test_records_of_a_batch(name: str) -> None:
    for record in ({name: SAMPLES[name][0]}, expected(name).as_record()):
        (read,) = read_records(json.dumps({"prompt": "x", **record}).encode(), Settings())
        assert read.error is None
        assert read.settings == expected(name)


@every_setting
def test_columns_of_a_batch(name: str) -> None:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["prompt", name], ["x", SAMPLES[name][1]]])
    (read,) = read_records(table.getvalue().encode(), Settings(), is_csv=True)
    assert read.error is None
    assert read.settings == expected(name)


@every_setting
def test_methods_of_an_evaluation(name: str) -> None:
    if name != "prefer":  # an evaluation has its own
        written = f"mine:{name.replace('_', '-')}={SAMPLES[name][1]}"
        assert method(written, Settings()) == ("mine", expected(name))
        more = f"{written},top_k=9"
        assert method(more, Settings())[1] == expected(name).replace(top_k=9)


class FakeChat:
    """What `/set` needs of a chat."""

    def __init__(self) -> None:
        self.conversation = self
        self.settings = Settings()
        self.tell: Callable[[str], None] = lambda text: None


@every_setting
def test_set_in_a_chat(name: str) -> None:
    chat: Any = FakeChat()
    slash.run(
        chat, f"/set {name} {json.dumps(SAMPLES[name][1]) if name == 'stop' else SAMPLES[name][1]}"
    )
    assert chat.settings == expected(name)
    if SETTINGS[name].kind in SEVERAL:
        slash.run(chat, f"/set {name} none")
        assert chat.settings == Settings()


@every_setting
def test_requests_to_the_server(name: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], name: SAMPLES[name][0]}
    if name == "system":  # that is a message
        return
    changed = ChatRequest.model_validate_json(json.dumps(body)).changes()
    assert Settings(**changed) == expected(name)


@every_setting
def test_options_of_llm(name: str) -> None:
    own = {name: SAMPLES[name][0]} if name in ("system", "schema") else {}
    options = llm_plugin.AmuletModel.Options(**({} if own else {name: SAMPLES[name][1]}))
    found = llm_plugin._settings(options, own.get("system"), own.get("schema"))
    assert found == expected(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_ctx", 512),
        ("n_gpu_layers", 0),
        ("n_threads", 1),
        ("n_batch", 64),
        ("cache_type", "q8_0"),
        ("rpc", "a:1"),
        ("model", "m"),
        ("draft_model", "m"),
        ("chat_template", "t.jinja"),
        ("trust_model", True),
    ],
)
def test_ways_to_load_a_model(name: str, value: Any) -> None:
    from amulet_gguf.cli import main

    loading = Loading(**{name: value})
    option = f"--{name.replace('_', '-')}"
    arguments = [option] if value is True else [option, str(value)]
    assert chosen(*arguments)[1] == loading
    assert llm_plugin._given(llm_plugin.AmuletModel.Options(**{name: value}), LOADING) == {name: value}
    assert CliRunner().invoke(main, ["profiles", "add", "p", *arguments]).exit_code == 0
    assert chosen("--profile", "p")[1] == loading


@pytest.mark.parametrize("name", [name for name, each in SETTINGS.items() if each.is_number])
def test_errors_name_their_field(name: str) -> None:
    from amulet_gguf.errors import SettingError

    with pytest.raises(SettingError) as error:
        Settings(**{name: "?"})  # type: ignore[arg-type]
    assert error.value.field == name
