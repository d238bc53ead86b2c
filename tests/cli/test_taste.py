"""`amulet taste`: asked, answered, shown, forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from amulet_gguf.cli import main
from amulet_gguf.evaluation.reading import make_groups, write_page
from amulet_gguf.home import config
from amulet_gguf.preferences import PRESETS
from amulet_gguf.taste.taste import Candidate, Choice, Taste, open_taste

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    for name in ("AMULET_MODEL", "AMULET_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    # Which pair is shown is chance's, and some presets can lead to the same few words.
    monkeypatch.setattr(Taste, "pair", lambda _: (PRESETS["formal"], PRESETS["uplifting"]))
    return tmp_path


def taste(*arguments: str, said: str = "") -> Result:
    return CliRunner().invoke(main, ["taste", *arguments], input=said)


def test_choices_are_kept_and_a_second_run_goes_on() -> None:
    options = ["mine", "-n", "6", "--strength", "3", "--prefer", "Answer like an old sailor."]
    first = taste(*options, said="What is rain?\nno\na\n")
    assert first.exit_code == 0
    assert "1 choice: " in first.stderr
    assert "not sure enough for a profile" in first.stderr
    assert first.stdout.count("[…]") == 2  # both were cut
    assert first.stdout.count("─") > 20  # the columns, and nothing that was said, are on stdout
    assert "Your message" not in first.stdout
    second = taste(*options, said="\nB\n\n=\n")
    assert "2 choices: " in second.stderr
    one, two = open_taste("mine").choices
    assert one.messages == [{"role": "user", "content": "What is rain?"}]
    assert two.messages[0]["content"].endswith(("?", "."))
    assert "Answer like an old sailor." in one.better.features
    assert one.model.endswith(".gguf")
    assert {one.better.prefer, one.worse.prefer} <= {"", *PRESETS.values(), "Answer like an old sailor."}


def test_questions_may_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('[{"prompt": "What is rain?"}, {"prompt": "Who sleeps?"}]')
    done = taste("mine", "-n", "4", "--strength", "3", "--questions", str(path), said="a\nb\n")
    assert done.exit_code == 0
    asked = [choice.messages[0]["content"] for choice in open_taste("mine").choices]
    assert asked == ["What is rain?", "Who sleeps?"]
    assert "Who sleeps?" in done.stderr


def test_equal_answers_are_not_asked_about() -> None:
    done = taste("mine", "-n", "4", "--strength", "0", said="What is rain?\n")
    assert "The two are the same" in done.stderr
    assert open_taste("mine").choices == []


def learned(name: str = "mine") -> None:
    features = dict.fromkeys(PRESETS.values(), 0.0)
    better = Candidate("x", features | {PRESETS["formal"]: 0.2}, PRESETS["formal"])
    for other in ("verbose", "creative", "complex"):
        worse = Candidate(f"not {other}", features | {PRESETS[other]: 0.2}, PRESETS[other])
        open_taste(name).add(
            *(Choice([{"role": "user", "content": str(i)}], better, worse) for i in range(4))
        )


def test_what_is_known_is_shown() -> None:
    learned()
    shown = taste("mine", "--show").stdout
    assert "formal" in shown.splitlines()[1]
    assert "IN THE PROFILE" in shown
    record = json.loads(taste("mine", "--json").stdout)
    assert record["choices"] == 12
    first = record["attributes"][0]
    assert first["text"] == PRESETS["formal"]
    assert first["weight"] == 1.0
    assert 0.5 < first["sureness"] <= 1
    assert len(record["attributes"]) == 8


def test_the_profile_answers(home: Path) -> None:
    learned()
    assert config.load_config().profiles["mine"] == {"prefer": ["formal:1"]}
    done = CliRunner().invoke(main, ["generate", "Hi", "--profile", "mine", "-n", "3", "--json"])
    assert json.loads(done.stdout)["prefer"][0]["text"] == PRESETS["formal"]


def test_forgetting() -> None:
    learned()
    assert taste("mine", "--forget").exit_code == 0
    assert open_taste("mine").choices == []
    again = taste("mine", "--forget")
    assert again.exit_code == 1
    assert "there is no taste 'mine'" in again.stderr


def test_readers_ranks_are_learned_from_once(tmp_path: Path) -> None:
    texts = {"a": "Rain is water, friend!", "b": "Water.", "c": "Precipitation occurs."}
    (group,) = make_groups([(0, "What is rain?", "formal", name, text) for name, text in texts.items()])
    write_page(tmp_path, [group])
    places = {text: each for each, text in group.texts.items()}
    order = [[places[texts[name]]] for name in "cab"]
    ranks = {"group": group.id, "order": order, "broken": []}
    (tmp_path / "ranks.json").write_text(json.dumps({"format": "amulet-ranks", "ranks": [ranks]}))
    done = taste("read", "--from", str(tmp_path))
    assert done.exit_code == 0, done.output
    found = [(choice.better.text, choice.worse.text) for choice in open_taste("read").choices]
    assert found == [(texts["c"], texts["a"]), (texts["a"], texts["b"])]
    taste("read", "--from", str(tmp_path))
    assert len(open_taste("read").choices) == 2
    assert taste("read", "--from", str(tmp_path / "nosuch")).exit_code == 2


def test_mistakes_are_told_in_a_line() -> None:
    config.set_profile("work", {"prefer": ["concise"]})
    for arguments, cure in (
        (("work",), "choose another name"),
        (("a b",), "letters, digits"),
        (("mine", "--from", "."), "amulet eval --read writes it"),
    ):
        done = taste(*arguments)
        assert done.exit_code == 1
        assert done.stderr.startswith("Error: ")
        assert cure in done.stderr
