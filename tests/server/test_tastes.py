"""Tastes over HTTP: a pair is asked for, a choice is learned from, a profile comes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fixture_types import Tiny
from serving import Running, is_free, serving, until

from amulet_gguf.home.config import load_config
from amulet_gguf.preferences import PRESETS
from amulet_gguf.server import tastes
from amulet_gguf.taste.taste import Candidate, Choice, open_taste

MINE = "/v1/tastes/mine"
HI = [{"role": "user", "content": "How are you?"}]
SAILOR = "Answer like an old sailor."


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMULET_HOME", str(tmp_path_factory.mktemp("home")))
        with serving(tiny("llama"), config=load_config()) as running:
            yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
    until(lambda: is_free(server.service))


def choice(**changes: Any) -> dict[str, Any]:
    body = {
        "messages": HI,
        "better": {"text": "Ahoy, I am well.", "prefer": SAILOR},
        "worse": {"text": "Fine.", "prefer": ""},
        "own": [SAILOR],
    }
    return body | changes


def test_a_pair_is_answered_and_a_choice_is_learned_from(http: httpx.Client) -> None:
    state = http.get(MINE, params={"own": SAILOR}).json()
    assert (state["choices"], state["prefer"]) == (0, [])
    assert {each["text"] for each in state["attributes"]} == {*PRESETS, SAILOR}
    first, second = state["pair"]
    assert first != second
    assert {first, second} <= {"", *PRESETS, SAILOR}
    assert open_taste("mine").choices == []  # asking keeps nothing
    reply = http.post(MINE, json=choice())
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"] == 1
    (kept,) = open_taste("mine").choices
    assert kept.better.text == "Ahoy, I am well."
    assert set(kept.better.features) == {*PRESETS.values(), SAILOR}
    assert any(kept.better.features.values())
    assert kept.messages == HI
    assert http.get(MINE).json()["choices"] == 1


def test_what_is_learned_is_a_profile_that_the_next_request_can_name(http: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": HI, "max_tokens": 2, "profile": "mine"}
    assert http.post("/v1/chat/completions", json=body).status_code == 400
    features = dict.fromkeys(PRESETS.values(), 0.0)
    for i, other in enumerate(("verbose", "creative", "complex") * 4):
        better = Candidate("x", features | {PRESETS["formal"]: 0.1}, PRESETS["formal"])
        worse = Candidate("y", features | {PRESETS[other]: 0.1}, PRESETS[other])
        open_taste("mine").add(Choice([{"role": "user", "content": str(i)}], better, worse))
    assert http.post(MINE, json=choice(own=[])).json()["prefer"][0]["text"] == "formal"
    assert load_config().profiles["mine"]["prefer"]
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert http.delete(MINE).json() == {"name": "mine", "forgotten": True}
    assert http.post("/v1/chat/completions", json=body).status_code == 400
    assert http.get(MINE).json()["choices"] == 0
    assert http.delete(MINE).status_code == 400


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (choice(messages=[]), "must end with a message of the user"),
        (choice(messages="Hi"), "messages"),
        (choice(better="Ahoy"), "better"),
        (choice(better={"text": 3}), "better.text"),
        (choice(worse={"text": "x", "score": 1}), "worse.score"),
        (choice(own=[""]), "empty"),
        (choice(own=[f"Be like person {i}, please." for i in range(9)]), "16 attributes"),
        (choice(name="other"), "name"),
        ({}, "messages"),
        ([], "body"),
    ],
)
def test_bad_choices_are_refused_and_nothing_is_kept(http: httpx.Client, body: Any, told: str) -> None:
    reply = http.post(MINE, json=body)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]
    assert open_taste("mine").choices == []


@pytest.mark.parametrize("name", ["none", "a%20b", "%2e%2e", "a.json", "x" * 65])
def test_bad_names_are_refused(http: httpx.Client, home: Path, name: str) -> None:
    for reply in (
        http.get(f"/v1/tastes/{name}"),
        http.post(f"/v1/tastes/{name}", json=choice()),
        http.delete(f"/v1/tastes/{name}"),
    ):
        assert reply.status_code in (400, 404)
    assert not list(home.rglob("*.json"))


def test_a_profile_that_was_not_learned_is_not_changed(http: httpx.Client, home: Path) -> None:
    (home / "config.toml").write_text('[profiles.mine]\nprefer = ["concise"]\n')
    reply = http.post(MINE, json=choice())
    assert reply.status_code == 400
    assert "was not learned" in reply.json()["error"]["message"]
    assert load_config().profiles["mine"]["prefer"] == ["concise"]


def test_others_get_answers_while_it_learns_and_many_choices_are_all_kept(http: httpx.Client) -> None:
    replies: list[int] = []
    answered = threading.Event()
    is_first: list[bool] = []

    def choose(number: int) -> None:
        body = choice(messages=[{"role": "user", "content": f"{'Well, ' * 90}{number}?"}])
        replies.append(http.post(MINE, json=body).status_code)
        is_first.append(answered.is_set())

    threads = [threading.Thread(target=choose, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    body = {"messages": HI, "max_tokens": 20}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    answered.set()
    for thread in threads:
        thread.join()
    assert replies == [200] * 4
    assert any(is_first)  # the answer did not wait for all of them
    assert len(open_taste("mine").choices) == 4


def test_a_conversation_that_does_not_fit_is_refused(http: httpx.Client) -> None:
    reply = http.post(MINE, json=choice(messages=[{"role": "user", "content": "word " * 3000}]))
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_too_many_that_wait_are_told_to_come_back(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tastes, "_MAX_WAITING", 0)
    reply = http.post(MINE, json=choice())
    assert reply.status_code == 503
    assert reply.headers["retry-after"]


def test_a_disk_that_cannot_be_written_is_the_servers_fault(http: httpx.Client, home: Path) -> None:
    (home / "tastes").write_text("in the way")
    assert http.post(MINE, json=choice()).status_code == 500
