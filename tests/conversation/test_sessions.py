"""Saved conversations: nothing lost, nothing believed that is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amulet_gguf.conversation import sessions
from amulet_gguf.conversation.sessions import Session
from amulet_gguf.errors import SessionError
from amulet_gguf.preferences import Preference
from amulet_gguf.prompts.template import Encoded
from amulet_gguf.settings import Settings

TURNS = [{"role": "user", "content": "Hi \ud83c"}, {"role": "assistant", "content": "Hello\n"}]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(2000))
    return path


def preferred() -> Settings:
    return Settings(prefer=(Preference("Be kind.", -0.5),), strength=3, seed=4, stop=("a",))


def test_what_is_saved_is_loaded() -> None:
    sessions.save("one", Session(TURNS, preferred(), "m.gguf"))
    found = sessions.load("one")
    assert found.settings == preferred()
    assert found.messages[1] == TURNS[1]
    assert found.messages[0]["content"] == "Hi ?"  # half a surrogate pair has no place in a file
    assert found.model == "m.gguf"
    assert sessions.names() == ["one"]
    sessions.remove("one")
    assert sessions.names() == []


def test_a_failed_save_leaves_the_session_before(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sessions.save("one", Session(TURNS))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SessionError, match="No space left"):
        sessions.save("one", Session([]))
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["one.json"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", ".x", "a.json", "a.kv", "a" * 101, "a b"]
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(SessionError, match="not a name"):
        sessions.save(name, Session(TURNS))


def test_a_newer_version_is_told_from_damage(home: Path) -> None:
    path = sessions.save("one", Session(TURNS))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"version": sessions.VERSION + 1}))
    with pytest.raises(SessionError, match="newer amulet"):
        sessions.load("one")


def test_an_older_file_without_newer_fields_opens() -> None:
    path = sessions.save("one", Session(TURNS, preferred()))
    record = json.loads(path.read_text())
    for name in ("fade", "withhold_echo", "protect_facts"):
        del record["settings"][name]
    del record["model"], record["saved_at"]
    record["settings"]["gone_since"] = 1
    path.write_text(json.dumps(record))
    assert sessions.load("one").settings == preferred()


def test_what_0_1_0_wrote_without_being_asked_is_left_out() -> None:
    path = sessions.save("one", Session(TURNS, preferred()))
    record = json.loads(path.read_text())
    for strength, expected in ((5.65, None), (4.0, 4.0)):
        record["settings"] |= {"adapt": "divergence", "strength": strength, "plausibility": 0.1}
        path.write_text(json.dumps(record))
        loaded = sessions.load("one").settings
        assert (loaded.strength, loaded.plausibility) == (expected, Settings().plausibility)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"format": "other"}',
        '{"format": "amulet-session", "version": 1}',
        '{"format": "amulet-session", "version": true, "messages": 3}',
        '{"format": "amulet-session", "version": 1, "messages": [{"role": "user", "content": "x"}]}',
        '{"format": "amulet-session", "version": 1, "messages": [], "settings": {"strength": "x"}}',
        '{"format": "amulet-session", "version": 1, "messages": [], "settings": {"prefer": [1]}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_damage_is_one_line_with_the_file(home: Path, text: str) -> None:
    path = sessions.save("one", Session(TURNS))
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SessionError, match=r"one\.json") as caught:
        sessions.load("one")
    assert "\n" not in str(caught.value)


HELD = Encoded("some text", np.arange(7, dtype=np.int32))


def test_a_cache_comes_back(model: Path) -> None:
    sessions.save("one", Session(TURNS))
    sessions.save_cache("one", model, HELD, b"data" * 99)
    found = sessions.load_cache("one", model)
    assert found is not None
    assert found[0].text == HELD.text
    assert found[0].tokens.tolist() == HELD.tokens.tolist()
    assert found[1] == b"data" * 99
    assert sessions.load_cache("two", model) is None


def test_a_cache_is_of_one_type(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions.save("one", Session(TURNS))
    sessions.save_cache("one", model, HELD, b"data", "q8_0")
    assert sessions.load_cache("one", model, "q8_0") is not None
    for other in ("f16", "q4_0"):
        with pytest.raises(SessionError, match="another model, cache type or"):
            sessions.load_cache("one", model, other)
    with monkeypatch.context() as before:  # as it was written when there was no other type
        origin = sessions._origin(model, "f16")
        del origin["cache_type"]
        before.setattr(sessions, "_origin", lambda *_: origin)
        sessions.save_cache("one", model, HELD, b"data")
    assert sessions.load_cache("one", model) is not None
    with pytest.raises(SessionError, match="cache type"):
        sessions.load_cache("one", model, "q8_0")


def test_a_cache_is_of_one_model_and_one_llama_cpp(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions.save("one", Session(TURNS))
    sessions.save_cache("one", model, HELD, b"data")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF" + bytes(2001))
    with pytest.raises(SessionError, match="another model"):
        sessions.load_cache("one", other)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "9.9")
    with pytest.raises(SessionError, match=r"cache type or llama\.cpp"):
        sessions.load_cache("one", model)


@settings(deadline=None)
@given(st.data())
def test_any_flipped_bit_or_cut_of_a_cache_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("memory")
        patch.setenv("AMULET_HOME", str(folder))
        model = folder / "m.gguf"
        model.write_bytes(b"GGUF" + bytes(200))
        path = sessions.save("one", Session(TURNS)).with_suffix(".kv")
        sessions.save_cache("one", model, HELD, b"data" * 9)
        blob = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(blob) - 1))
        if data.draw(st.booleans()):
            blob[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del blob[place:]
        path.write_bytes(blob)
        with pytest.raises(SessionError):
            sessions.load_cache("one", model)
