"""Tastes: what is kept of them, the profile they make, the pair they ask about."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as checked
from hypothesis import strategies as st

from amulet_gguf.errors import AmuletError, ConfigError, TasteError
from amulet_gguf.home import config
from amulet_gguf.home.paths import config_file, tastes_folder
from amulet_gguf.preferences import PRESETS, Preference
from amulet_gguf.settings import Settings
from amulet_gguf.taste import taste as tastes
from amulet_gguf.taste.taste import Candidate, Choice, Taste, open_taste

SAILOR = Preference("Answer like an old sailor.")
STRANGE = Preference("Say it in a ratio 3:2")  # its short form would be read as a weight


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    return tmp_path


def candidate(name: str, **more: float) -> Candidate:
    """An answer of which one attribute, or none, is likelier than the others."""
    features = dict.fromkeys(PRESETS.values(), 0.0)
    features |= {PRESETS.get(key, key): value for key, value in more.items()}
    return Candidate(f"text of {name}", features, PRESETS.get(name, ""))


NUMBERS = itertools.count()


def choice(better: str, worse: str, size: float = 0.1) -> Choice:
    messages = [{"role": "user", "content": f"What is {next(NUMBERS)}?"}]
    return Choice(
        messages, candidate(better, **{better: size}), candidate(worse, **{worse: size}), "m.gguf"
    )


def test_choices_become_a_profile_that_commands_can_use() -> None:
    taste = open_taste("mine")
    assert taste.preferences() == ()
    for other in ("verbose", "creative", "complex") * 4:
        taste.add(choice("formal", other))
    (preference,) = taste.preferences()
    assert preference == Preference("formal", 1.0)
    assert config.load_config().profiles["mine"]["prefer"] == ["formal:1"]
    assert open_taste("mine") == taste


def test_what_is_disliked_gets_a_negative_weight_and_sizes_sum_to_one() -> None:
    taste = Taste("mine")
    for other in ("creative", "complex", "pleasant", "concise") * 5:
        taste.choices += [choice("formal", other), choice(other, "verbose")]
    found = {each.name: each.weight for each in taste.preferences()}
    assert found.keys() >= {"formal", "verbose"}
    assert found["formal"] > 0 > found["verbose"]
    assert len(found) <= tastes.MAX_KEPT
    assert sum(map(abs, found.values())) == pytest.approx(1, abs=0.02)


def test_of_a_profile_only_the_preferences_change(home: Path) -> None:
    taste = open_taste("mine")
    taste.add(*(choice("formal", "verbose") for _ in range(12)))
    config.set_profile("mine", {**config.load_config().profiles["mine"], "temperature": 0.5})
    open_taste("mine").add(*(choice("creative", "formal") for _ in range(40)))
    values = config.load_config().profiles["mine"]
    assert values["temperature"] == 0.5
    assert not any(each.startswith("formal:1") for each in values["prefer"])


def test_nothing_learned_makes_no_profile() -> None:
    open_taste("mine").add(choice("formal", "verbose"))
    assert "mine" not in config.load_config().profiles
    assert len(open_taste("mine").choices) == 1


def test_a_profile_that_was_not_learned_is_not_touched() -> None:
    config.set_profile("work", {"prefer": ["concise"]})
    with pytest.raises(TasteError, match="not learned: choose another name"):
        open_taste("work")
    with pytest.raises(TasteError, match="no taste 'work'"):
        tastes.forget("work")
    assert config.load_config().profiles["work"] == {"prefer": ["concise"]}


def test_forgetting_removes_choices_and_profile(home: Path) -> None:
    open_taste("mine").add(*(choice("formal", "verbose") for _ in range(12)))
    tastes.forget("mine")
    assert [path.name for path in tastes_folder().iterdir()] == ["tastes.lock"]
    assert "mine" not in config.load_config().profiles
    assert open_taste("mine").choices == []
    with pytest.raises(TasteError, match="no taste 'mine'"):
        tastes.forget("mine")


def test_own_preferences_are_attributes_and_can_be_learned() -> None:
    taste = open_taste("mine", [SAILOR, STRANGE, Preference("formal")])
    assert taste.attributes == (*PRESETS.values(), SAILOR.text, STRANGE.text)
    features = dict.fromkeys(taste.attributes, 0.0)
    liked = Candidate("Arr.", features | {SAILOR.text: 0.1}, SAILOR.text)
    for text in (*PRESETS.values(), STRANGE.text):
        other = Candidate("Well.", features | {text: 0.1}, text)
        taste.add(Choice([{"role": "user", "content": text}], liked, other))
    assert open_taste("mine").attributes == taste.attributes
    profile = config.load_config()
    assert profile.settings("mine", Settings()).prefer[0].text == SAILOR.text


@pytest.mark.parametrize("preference", [SAILOR, STRANGE, Preference("formal", -0.25)])
def test_a_preference_is_written_so_that_it_is_read_again(preference: Preference) -> None:
    config.set_profile("mine", {"prefer": [tastes._written(preference)]})
    assert config.load_config().settings("mine", Settings()).prefer == (preference,)


def test_choices_made_before_there_was_an_attribute_say_nothing_of_it() -> None:
    open_taste("mine").add(*(choice("formal", "verbose") for _ in range(10)))
    taste = open_taste("mine", [SAILOR])
    told = {weight.text: weight for weight in taste.weights()}
    assert told[SAILOR.text].sureness < 0.3
    assert told[PRESETS["formal"]].sureness > 0.5


def test_what_answers_to_any_instruction_share_is_left_out() -> None:
    taste = Taste("mine")
    for other in ("verbose", "creative", "complex") * 4:
        better, worse = candidate("formal", formal=0.1), candidate(other, **{other: 0.1})
        better = Candidate(
            "x", {text: value + 5 for text, value in better.features.items()}, better.prefer
        )
        taste.choices.append(Choice([], better, worse))
    assert [each.name for each in taste.preferences()] == ["formal"]


def test_the_next_pair_is_of_what_is_not_known_yet() -> None:
    taste = Taste("mine")
    chance = random.Random(0)
    first = [taste.pair(chance) for _ in range(60)]
    assert len({frozenset(pair) for pair in first}) > 10  # nothing is known: any will do
    assert all(a != b and {a, b} <= {"", *taste.attributes} for a, b in first)
    for other in ("verbose", "creative", "complex") * 2:
        taste.choices.append(choice("formal", other))
    told = {weight.text: weight.sureness for weight in taste.weights()}
    asked = [text for _ in range(20) for text in taste.pair(chance)]
    assert asked.count(PRESETS["formal"]) > 5  # likely, and not yet sure
    assert told[PRESETS["formal"]] == max(told.values())


def test_which_of_the_two_is_which_tells_nothing() -> None:
    taste = Taste("mine", choices=[choice("formal", "verbose"), choice("formal", "creative")])
    pairs = [taste.pair(random.Random(seed)) for seed in range(40)]
    firsts = [a < b for a, b in pairs]
    assert 5 < sum(firsts) < 35


@pytest.mark.parametrize("name", ["", "a b", "../x", "none", "x" * 65, "mine.json", "é"])
def test_names_are_those_of_profiles(name: str) -> None:
    for use in (open_taste, tastes.forget):
        with pytest.raises(TasteError, match="is not a name for a taste"):
            use(name)


def test_too_many_attributes_are_refused() -> None:
    own = [Preference(f"Answer like person {i}, please.") for i in range(9)]
    with pytest.raises(TasteError, match="16 attributes, the presets among them, got 17"):
        open_taste("mine", own)


def test_the_oldest_of_ones_own_attributes_make_room() -> None:
    own = [Preference(f"Answer like person {i}, please.") for i in range(12)]
    for each in own:
        taste = open_taste("mine", [each])
        taste.add(choice("formal", "verbose"))
    assert open_taste("mine").attributes == (*PRESETS.values(), *(each.text for each in own[4:]))


def _add(name: str, home: str, better: str) -> None:
    os.environ["AMULET_HOME"] = home
    for _ in range(5):
        open_taste(name).add(choice(better, "verbose"))


def test_programs_that_know_other_attributes_keep_each_others() -> None:
    one, other = open_taste("mine", [SAILOR]), open_taste("mine", [STRANGE])
    one.add(choice("formal", "verbose"))
    other.add(choice("formal", "creative"))
    assert open_taste("mine").attributes == (*PRESETS.values(), SAILOR.text, STRANGE.text)


def test_what_was_forgotten_elsewhere_stays_forgotten() -> None:
    taste = open_taste("mine")
    taste.add(*(choice("formal", "verbose") for _ in range(12)))
    tastes.forget("mine")
    taste.add(choice("formal", "verbose"))
    assert len(open_taste("mine").choices) == 1
    assert "mine" not in config.load_config().profiles


def test_the_same_choice_twice_is_one_choice() -> None:
    same = choice("formal", "verbose")
    taste = open_taste("mine")
    taste.add(same, same)
    taste.add(same)
    assert len(open_taste("mine").choices) == 1


def test_comments_in_the_profile_stay(home: Path) -> None:
    open_taste("mine").add(*(choice("formal", "verbose") for _ in range(12)))
    path = config_file()
    path.write_text(path.read_text() + "# so that it is short\nmax_tokens = 50\n")
    open_taste("mine").add(*(choice("creative", "formal") for _ in range(40)))
    assert "# so that it is short" in path.read_text()
    assert "formal:1" not in path.read_text()


def test_a_profile_written_by_hand_after_the_first_choices_is_not_taken_over() -> None:
    open_taste("mine").add(choice("formal", "verbose"))
    config.set_profile("mine", {"prefer": ["concise"]})
    with pytest.raises(TasteError, match="was not learned"):
        open_taste("mine")
    tastes.forget("mine")
    assert config.load_config().profiles["mine"] == {"prefer": ["concise"]}


def test_a_file_does_not_outgrow_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tastes, "_MAX_BYTES", 20_000)
    for _ in range(60):
        last = choice("formal", "verbose")
        open_taste("mine").add(last)
    assert (tastes_folder() / "mine.json").stat().st_size < 20_000
    choices = open_taste("mine").choices
    assert 5 < len(choices) < 60
    assert choices[-1].key == last.key


def test_two_programs_lose_no_choice_of_each_other(home: Path) -> None:
    context = get_context("spawn")
    others = [
        context.Process(target=_add, args=("mine", str(home), better))
        for better in ("formal", "creative")
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(open_taste("mine").choices) == 10


def test_a_failure_in_the_middle_of_writing_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    open_taste("mine").add(choice("formal", "verbose"))
    before = (tastes_folder() / "mine.json").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TasteError, match="No space left"):
        open_taste("mine").add(choice("formal", "verbose"))
    assert (tastes_folder() / "mine.json").read_bytes() == before


def _write(content: str | bytes) -> Path:
    path = tastes_folder() / "mine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "{}", b"\xff\xfe", "[" * 100_000, '{"format": "other"}',
     '{"format": "amulet-taste", "version": 1, "attributes": 3, "choices": []}',
     '{"format": "amulet-taste", "version": 1, "attributes": [""], "choices": []}',
     '{"format": "amulet-taste", "version": 1, "attributes": [], "choices": [{}]}',
     '{"format": "amulet-taste", "version": "1", "attributes": [], "choices": []}'],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line_and_can_be_forgotten(content: str | bytes) -> None:
    path = _write(content)
    with pytest.raises(TasteError) as caught:
        open_taste("mine")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    tastes.forget("mine")


def test_a_file_from_a_newer_version_says_so() -> None:
    _write('{"format": "amulet-taste", "version": 2}')
    with pytest.raises(TasteError, match="from a newer amulet"):
        open_taste("mine")


@checked(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_is_refused_or_understood(data: st.DataObject) -> None:
    taste = Taste("mine", choices=[choice("formal", "verbose")])
    path = _write("")
    tastes._save(path, taste)
    record = json.loads(path.read_text())
    values: list[Any] = [None, True, -1, 1e400, 1e160, math.nan, "x", [], {}, [None], {"a": {}}, 10**400]
    strange = data.draw(st.sampled_from(values))
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(
            st.sampled_from(sorted(place))
            if isinstance(place, Mapping)
            else st.integers(0, len(place) - 1)
        )
    place[key] = strange
    _write(json.dumps(record))
    try:
        found = open_taste("mine")
    except TasteError:
        return
    found.pair()
    found.preferences()


def test_a_profile_that_cannot_be_written_costs_no_choice(home: Path) -> None:
    config_file().write_text("nonsense = [")
    taste = Taste("mine")
    with pytest.raises(ConfigError):
        taste.add(*(choice("formal", "verbose") for _ in range(12)))
    config_file().unlink()
    assert len(open_taste("mine").choices) == 12
    with pytest.raises(AmuletError):
        open_taste("..")
