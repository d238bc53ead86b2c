"""The chat, as a person has it: at a real terminal, over a pipe, interrupted, misused."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from fixture_types import Tiny
from terminals import CHAT, Terminal

from amulet_gguf.cli import main
from amulet_gguf.conversation import sessions
from amulet_gguf.preferences import PRESETS
from amulet_gguf.taste.taste import Taste, open_taste

pytestmark = pytest.mark.model

UP, DOWN = "\x1b[1;5A", "\x1b[1;5B"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path))
    for name in ("AMULET_MODEL", "AMULET_PROFILE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    terminals = []

    def begin(*arguments: str, **env: str) -> Terminal:
        terminals.append(Terminal(*arguments, **env))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.kill()


Start = Callable[..., Terminal]


def pipe(lines: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CHAT, *arguments], input=lines, capture_output=True, text=True)


def test_a_conversation_at_a_terminal(start: Start) -> None:
    terminal = start("-n", "12", "-p", "uplifting")
    terminal.ready()
    terminal.say("What is rain?")
    terminal.until("stopped at 12 tokens")
    terminal.ready()
    terminal.say("/prefer concise formal:0.5")
    terminal.until(r"concise, formal:0\.5 · strength auto")
    terminal.ready()
    terminal.say("/strength abc")
    terminal.until("Error: strength must be a number")
    terminal.ready()
    terminal.say("/strenght 2")
    terminal.until("did you mean /strength")
    terminal.say("/strength 2")
    terminal.until(r"strength 2\b")
    terminal.say("And snow?")
    terminal.ready()
    terminal.say("/why")
    terminal.until("tokens changed, mean KL")
    terminal.ready()
    terminal.say("/compare")
    terminal.until("linear alignment")
    terminal.ready()
    terminal.say("/undo")
    terminal.until(r"taken back: And snow\?")
    terminal.ready()
    terminal.say("/system Be kind.")
    terminal.until(r"system: Be kind\.")
    terminal.ready()
    terminal.say("/set temperature 0.5")
    terminal.until(r"temperature = 0\.5")
    terminal.ready()
    terminal.say("/show")
    terminal.until(r"\b1 turn\b")
    terminal.ready()
    terminal.say("/regen")
    terminal.until(lambda text: text.count("stopped at 12 tokens") >= 2)
    terminal.ready()
    terminal.say("/save rainy cache")
    terminal.until(r"rainy\.kv")
    terminal.ready()
    terminal.say("/help")
    terminal.until("Ctrl-D leaves")
    terminal.press("\x04")
    assert terminal.end() == 0
    saved = sessions.load("rainy")
    assert saved.messages[0]["content"] == "What is rain?"
    assert saved.settings.system == "Be kind."
    assert saved.settings.strength == 2


def test_ctrl_c_stops_the_answer_and_keeps_the_session(start: Start) -> None:
    terminal = start("-p", "verbose")
    terminal.ready()
    terminal.say("Tell me a very long story about the sea.")
    terminal.until("Ctrl-C stops")
    terminal.press("\x03")
    terminal.until(r"\[stopped\]")
    terminal.ready()
    terminal.press("\x03")  # at the prompt it clears the line
    terminal.until("Ctrl-D or /exit leaves")
    terminal.n_prompts += 1
    terminal.ready()
    terminal.say("/show")
    terminal.until(r"\b1 turn\b")
    terminal.ready()
    terminal.say("/exit")
    assert terminal.end() == 0
    (name,) = sessions.names()
    assert sessions.load(name).messages[1]["content"]


def test_keys_change_the_strength_of_the_answer_under_way(start: Start) -> None:
    terminal = start("-p", "creative", "-s", "3", "--fade", "none")
    terminal.ready()
    terminal.say("Tell me a long story about a house, with many people in it.")
    terminal.until(r"strength 3 +Ctrl-↑")
    terminal.press(UP)
    terminal.until(r"strength 3\.5")
    terminal.press(UP + UP + DOWN)
    terminal.until(r"strength 4\b")
    terminal.press("\x03")
    terminal.until(r"\[strength 4\]")
    terminal.ready()


def test_a_ctrl_d_that_nobody_waits_for_leaves_afterwards(start: Start) -> None:
    terminal = start("-n", "24", "-p", "formal")
    terminal.ready()
    terminal.say("/compare What is rain?")
    terminal.until("/compare What is rain\\?\n")
    time.sleep(0.3)  # the four answers take longer, and no line editor runs
    terminal.press("\x04")
    terminal.until("linear alignment")
    assert terminal.end() == 0


def test_alt_enter_begins_a_line_and_tab_completes(start: Start) -> None:
    terminal = start("-n", "4")
    terminal.ready()
    terminal.press("one\x1b\r")
    terminal.say("two")
    terminal.until("stopped at 4 tokens")
    terminal.ready()
    terminal.press("/stre\t")
    terminal.until("/strength")
    terminal.say(" 3")
    terminal.until("strength 3")
    terminal.press("\x04")
    assert terminal.end() == 0
    assert sessions.load(sessions.names()[0]).messages[0]["content"] == "one\ntwo"


def test_a_full_context_is_asked_about_and_nothing_is_cut(start: Start) -> None:
    terminal = start("-c", "256", "-n", "60")
    terminal.ready()
    long = "The people of the old house by the sea were learning to read. " * 6
    terminal.say(long)
    terminal.ready()
    terminal.say(long)
    terminal.until(r"Forget the oldest 1 of 1 turn\? \[y/N\]")
    terminal.press("n\r")
    terminal.until("nothing was forgotten")
    terminal.say("")  # the message waits to be sent again
    terminal.until(lambda text: text.count("[y/N]") == 2)
    terminal.press("y\r")
    terminal.ready()
    terminal.say("/exit")
    assert terminal.end() == 0
    # Before it was shortened, the conversation was saved whole.
    turns = [sessions.load(name).messages for name in sessions.names()]
    assert len(turns) == 2
    assert all(len(messages) == 2 for messages in turns)


def test_without_colours_there_are_none(start: Start) -> None:
    terminal = start("-n", "6", "-p", "formal", NO_COLOR="1")
    terminal.ready()
    terminal.say("What is **rain**?")
    terminal.ready()
    terminal.say("/why")
    terminal.until("mean KL")
    assert not re.findall(rb"\x1b\[(?:3[1-7]|38;|4[1-7]|48;)[\d;]*m", terminal.raw)


def test_a_dumb_terminal_gets_plain_text(start: Start) -> None:
    terminal = start("-n", "6", TERM="dumb")
    terminal.until("leaves")
    terminal.say("What is rain?")
    terminal.until("stopped at 6 tokens")
    terminal.say("/exit")
    assert terminal.end() == 0


def test_over_a_pipe_lines_are_messages_and_only_answers_are_on_stdout() -> None:
    done = pipe("What is rain?\n\n/prefer concise\nAnd snow?\n//exit is a word\n", "-n", "5")
    assert done.returncode == 0
    assert len(sessions.load(sessions.names()[0]).messages) == 6
    assert "\x1b" not in done.stdout
    assert "strength" not in done.stdout  # what /prefer says
    assert "stopped at 5 tokens" in done.stderr


def test_a_line_that_fails_does_not_end_the_others() -> None:
    done = pipe("/strength abc\n/nosuch\n/regen\n/undo\n/why\n/load nosuch\n/set x 1\nHi\n", "-n", "3")
    assert done.returncode == 1
    assert done.stderr.count("Error: ") == 7
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


def test_a_conversation_is_resumed_with_what_was_said_and_preferred() -> None:
    pipe("My name is Ann.\n/prefer formal\n/strength 2\nHello.\n", "-n", "4")
    (name,) = sessions.names()
    done = pipe("/show\n", "--resume")
    assert "2 turns" in done.stderr
    assert "formal · strength 2" in done.stderr
    assert pipe("", "--resume", "nosuch").returncode == 1
    assert "no session 'nosuch'" in pipe("", "--resume", "nosuch").stderr
    assert name in pipe("/show\n", "--resume", name).stderr


def test_what_is_typed_goes_before_what_was_saved() -> None:
    pipe("/prefer formal\n/strength 2\n/set temperature 0.5\nHello.\n/save one\n", "-n", "4")
    shown = pipe("/show\n", "--resume", "one", "--strength", "3").stderr
    assert "formal · strength 3" in shown
    assert "temperature 0.5" in shown
    assert "max_tokens 4" in shown


def test_conversations_do_not_take_each_others_names() -> None:
    done = pipe("Hi\n/save one\n/clear\nHo\n/clear\nHu\n/save one\n", "-n", "2")
    assert "a session 'one' already" in done.stderr
    said = [sessions.load(name).messages[0]["content"] for name in sessions.names()]
    assert sorted(said) == ["Hi", "Ho", "Hu"]


def test_forgotten_turns_stay_in_the_session_before() -> None:
    pipe("one\ntwo\n/save all\n/drop\nthree\n", "-n", "2")
    turns = {name: len(sessions.load(name).messages) // 2 for name in sessions.names()}
    assert turns.pop("all") == 2
    texts = [sessions.load(name).messages for name in turns]
    assert ["two", "three"] in [[each["content"] for each in text[::2]] for text in texts]


def test_an_answer_that_cannot_be_written_again_is_kept() -> None:
    long = "The people of the old house by the sea were learning to read. " * 12
    done = pipe(f"{long}\n/set system {long * 3}\n/regen\n/show\n", "-n", "4", "-c", "256")
    assert "the prompt has" in done.stderr
    assert "1 turn," in done.stderr


def test_a_damaged_cache_is_not_used(home: Path) -> None:
    pipe("My name is Ann.\n/save ann memory\n", "-n", "4")
    path = home / "sessions" / "ann.kv"
    assert "cache of" in pipe("Hi\n", "--resume", "ann", "-n", "2").stderr
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)
    done = pipe("Hi\n", "--resume", "ann", "-n", "2")
    assert done.returncode == 0
    assert "will be read again" in done.stderr
    assert done.stdout.strip()


def test_a_disk_that_cannot_be_written_costs_the_session_not_the_chat(home: Path) -> None:
    (home / "sessions").write_text("in the way")
    done = pipe("Hi\n", "-n", "3")
    assert done.stdout.strip()
    assert "not saved" in done.stderr


def test_sessions_are_listed_exported_and_removed() -> None:
    pipe("My name is Ann.\n/save ann\n", "-n", "4")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "amulet_gguf", "sessions", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    rows = json.loads(run("ls", "--json").stdout)
    assert {row["name"] for row in rows} == set(sessions.names())
    assert "My name is Ann." in run("ls").stdout
    assert "## You\n\nMy name is Ann." in run("export", "ann").stdout
    assert json.loads(run("export", "ann", "--json").stdout)["messages"][0]["role"] == "user"
    assert run("rm", "ann").returncode == 0
    assert run("rm", "ann").returncode == 1
    assert "no session 'ann'" in run("export", "ann").stderr


def test_answers_in_pairs_teach_a_taste_and_the_chosen_one_is_gone_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Which pair is shown is chance's, and some presets can lead to the same few words.
    monkeypatch.setattr(Taste, "pair", lambda _: ("Answer like an old sailor.", PRESETS["verbose"]))
    lines = [
        "/better A",
        "/prefer Answer like an old sailor.",
        "/ab",
        "What is rain?",
        "And snow?",
        "/better c",
        "/better b",
        "And snow?",
        "/better =",
        "And hail?",
        "/system Be kind.",
        "/undo",
        "/better A",
        "/regen",
        "/again",
        "/better =",
        "And ice?",
        "/ab off",
        "/show",
    ]
    arguments = ["chat", "-n", "8", "--strength", "3"]
    done = CliRunner().invoke(main, arguments, input="\n".join(lines) + "\n")
    assert done.stderr.count("Error: ") == 4  # no pair, no choice made, no such choice, no pair
    assert "/better A or /better B chooses" in done.stderr
    assert "1 choice: " in done.stderr
    assert "2 turns" in done.stderr
    taste = open_taste("mine")
    (choice,) = taste.choices
    assert taste.attributes[-1] == "Answer like an old sailor."
    (name,) = sessions.names()
    messages = sessions.load(name).messages
    assert len(messages) == 4
    assert messages[1]["content"] == choice.better.text
    assert messages[1]["content"] != choice.worse.text
    assert set(choice.better.features) == set(taste.attributes)


def test_a_pair_can_be_stopped_at_a_terminal_and_the_chat_goes_on(start: Start) -> None:
    terminal = start("--strength", "3")
    terminal.ready()
    terminal.say("/ab")
    terminal.until("answers come in pairs")
    terminal.ready()
    terminal.say("Tell me a very long story about the sea.")
    terminal.until(r"A +B")
    terminal.press("\x03")
    terminal.until(r"\[stopped\]")
    terminal.ready()
    terminal.say("/ab off")
    terminal.until("no preference")
    terminal.press("\x04")
    assert terminal.end() == 0
    assert sessions.names() == []


@pytest.fixture
def small(tiny: Tiny) -> tuple[str, ...]:
    """Arguments of a chat with a tiny model, which rambles on, and a context that is soon full."""
    return ("-m", str(tiny("llama")), "--trust-model", "-c", "256", "--logit-bias", "<|im_end|>:-100")


@pytest.mark.parametrize("key", ["\x03", "\x04", "n\r"])
def test_a_question_that_is_left_is_answered_with_no(
    start: Start, small: tuple[str, ...], key: str
) -> None:
    terminal = start(*small, "-n", "100")
    terminal.ready()
    terminal.say("one " * 20)
    terminal.until("stopped at 100 tokens")
    terminal.ready()
    terminal.say("two " * 20)
    terminal.until(r"Forget the oldest 1 of 1 turn\? \[y/N\]")
    terminal.press(key)
    terminal.until("nothing was forgotten")
    terminal.until(r"> (two ){5}[^>]*\Z")  # it comes back, to be sent again
    terminal.press("\x03")
    terminal.say("/show")
    terminal.until(r"\b1 turn\b")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_was_answered_is_kept_when_the_process_is_ended(
    start: Start, small: tuple[str, ...], number: int
) -> None:
    terminal = start(*small, "-c", "4096", "-n", "4000", "-p", "concise")
    terminal.ready()
    terminal.say("Talk.")
    terminal.until("Ctrl-C stops")
    terminal.signal(number)
    assert terminal.end() == 128 + number
    (name,) = sessions.names()
    assert sessions.load(name).messages[1]["content"]


def test_what_was_answered_is_kept_when_the_terminal_goes(start: Start, small: tuple[str, ...]) -> None:
    terminal = start(*small, "-c", "4096", "-n", "4000", "-p", "concise")
    terminal.ready()
    terminal.say("Talk.")
    terminal.until("Ctrl-C stops")
    terminal.close()
    (name,) = sessions.names()
    assert sessions.load(name).messages[1]["content"]


def test_a_history_that_cannot_be_kept_costs_nothing_else(
    start: Start, small: tuple[str, ...], home: Path
) -> None:
    (home / "history").symlink_to("/dev/full")
    terminal = start(*small, "-n", "5")
    terminal.ready()
    for _ in range(2):
        terminal.say("Hi")
        terminal.until("stopped at 5 tokens")
        terminal.ready()
    terminal.say("/show")
    terminal.until("2 turns")


def test_names_numbers_and_bytes_that_cannot_be_are_told_and_the_chat_goes_on(
    small: tuple[str, ...],
) -> None:
    lines = ["Hi", f"/save {'x' * 5000}", f"/save {'é' * 100}", f"/save {'汉' * 100}"]
    lines += [f"/drop {'9' * 5000}", f"/set seed {'9' * 5000}", f"/load {'x' * 5000}", "/save good"]
    data = "\n".join(lines).encode() + b"\ncaf\xe9\n/show\n"
    command = [*CHAT, *small, "-n", "3"]
    result = subprocess.run(command, input=data, capture_output=True)
    told = result.stderr.decode()
    assert result.returncode == 1
    assert "Traceback" not in told
    assert told.count("Error: ") == 6
    assert max(map(len, told.splitlines())) < 600
    assert "a line of stdin is not text in UTF-8" in told
    assert "1 turn" in told
    assert {"good", "é" * 100} <= set(sessions.names())
