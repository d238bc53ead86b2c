"""Many prompts: every record once, whatever happens in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from fixture_types import Tiny

from amulet_gguf.amulet import Amulet
from amulet_gguf.batch.records import Record
from amulet_gguf.batch.run import answers, result, size_batch
from amulet_gguf.engine.answer import Answer
from amulet_gguf.errors import AmuletError, PromptTooLongError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.llama.memory import cache_bytes
from amulet_gguf.llama.model import Model
from amulet_gguf.settings import Settings

PREFER: list[Any] = [None, "concise", ["formal", "verbose:0.5", "Write like a sailor."]]


def make_records(n: int, max_tokens: int = 6) -> list[Record]:
    return [
        Record(
            i + 1,
            Settings(prefer=PREFER[i % 3], max_tokens=1 + i % max_tokens, strength=2),
            f"Question {i}?",
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("parallel", [1, 2, 5])
def test_every_record_is_answered_once_and_at_most_so_many_at_a_time(tiny: Tiny, parallel: int) -> None:
    records = make_records(17)
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1, n_sequences=4 * parallel) as amulet:
        live: list[int] = []
        found = []
        for record, answer in answers(
            amulet, records, parallel, lambda _: live.append(amulet.engine.n_live)
        ):
            assert isinstance(answer, Answer)
            assert answer.usage.completion_tokens <= record.settings.max_tokens
            found.append(record.line)
        assert sorted(found) == [record.line for record in records]
        assert max(live) <= parallel
        assert amulet.engine.n_live == 0


def test_a_record_that_fails_ends_alone(tiny: Tiny) -> None:
    records = make_records(6)
    records[1] = Record(2, error="not JSON")
    records[3] = Record(4, Settings(), "word " * 5000)
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1, n_sequences=8) as amulet:
        found = {record.line: answer for record, answer in answers(amulet, records, 2)}
    assert isinstance(found[2], AmuletError)
    assert isinstance(found[4], PromptTooLongError)
    assert result(records[1], found[2]) == {"error": "not JSON"}
    assert all(isinstance(found[line], Answer) for line in (1, 3, 5, 6))


def test_logits_that_are_not_finite_fail_every_record_and_nothing_else(tiny: Tiny) -> None:
    with Amulet.load(tiny("corrupt_nan"), n_ctx=256, n_threads=1) as amulet:
        found = [answer for _, answer in answers(amulet, make_records(4), 2)]
    assert all(isinstance(answer, AmuletError) and "NaN" in str(answer) for answer in found)


def test_stopping_early_frees_everything(tiny: Tiny) -> None:
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1, n_sequences=12) as amulet:
        running = answers(amulet, make_records(9), 3)
        next(running)
        running.close()  # type: ignore[attr-defined]
        assert amulet.engine.n_live == 0


def test_what_is_planned_holds_every_answer_and_fits_into_memory(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(30, max_tokens=40)
    plan = size_batch(tiny_model, records)
    assert plan.parallel * 4 == plan.n_sequences == 32
    amulet = Amulet.of(tiny_model, Loading(n_ctx=plan.n_ctx, n_threads=1), plan.n_sequences)
    for record, answer in answers(amulet, records, plan.parallel):
        assert isinstance(answer, Answer)
        is_short = answer.usage.completion_tokens < record.settings.max_tokens
        assert answer.finish_reason == "stop" or not is_short
    amulet.engine.close()  # the model is everybody's
    one = cache_bytes(tiny_model.header, plan.n_ctx, 4)

    class Memory:
        available = 5 * one

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert size_batch(tiny_model, records).parallel == 2
    assert size_batch(tiny_model, records[:1]).parallel == 1
    assert size_batch(tiny_model, records, parallel=7).parallel == 7


def test_memory_is_flat_over_a_thousand_records(tiny: Tiny) -> None:
    process = psutil.Process()
    resident = []
    with Amulet.load(tiny("llama"), n_ctx=256, n_threads=1, n_sequences=16) as amulet:
        for number, _ in enumerate(answers(amulet, make_records(1000, max_tokens=3), 4)):
            if number in (100, 999):
                resident.append(process.memory_info().rss)
    assert resident[1] - resident[0] < 50e6


# The command


def write_input(folder: Path, n: int) -> Path:
    path = folder / "in.jsonl"
    lines = [json.dumps({"prompt": f"Question {i}?", "id": i, "prefer": "concise"}) for i in range(n)]
    lines[2] = "not json"
    path.write_text("\n".join(lines) + "\n")
    return path


def command(folder: Path, model: Path, output: str, *more: str) -> list[str]:
    base = [sys.executable, "-m", "amulet_gguf", "batch", str(folder / "in.jsonl"), "-m", str(model)]
    return [*base, "-o", str(folder / output), "-t", "1", "-n", "40", "--parallel", "1", *more]


def test_killed_at_any_moment_it_loses_and_repeats_nothing(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    write_input(tmp_path, 60)
    whole = subprocess.run(command(tmp_path, model, "whole.jsonl"), capture_output=True, check=True)
    assert b"line 3: not JSON" in whole.stderr
    size = (tmp_path / "whole.jsonl").stat().st_size
    random_numbers = random.Random(0)
    output = tmp_path / "out.jsonl"
    n_kills = 0
    while True:
        process = subprocess.Popen(
            command(tmp_path, model, "out.jsonl"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if n_kills < 20:  # somewhere in the next twentieth, also in the middle of a line
            have = output.stat().st_size if output.exists() else 0
            until = have + random_numbers.randrange(size // 20)
            while process.poll() is None and (not output.exists() or output.stat().st_size <= until):
                time.sleep(0.0005)
            process.kill()
            n_kills += 1
        assert process.stderr is not None
        complaints = process.stderr.read()
        process.stderr.close()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, complaints
    assert n_kills == 20
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [json.loads(line)["line"] for line in output.read_bytes().splitlines()] == [*range(1, 61)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_ctrl_c_says_how_to_go_on(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    write_input(tmp_path, 400)
    output = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        command(tmp_path, model, "out.jsonl"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not output.exists() or output.stat().st_size < 500:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"run the same command to go on" in err
    assert b"Traceback" not in err
    n_done = len(output.read_bytes().splitlines())
    dry = subprocess.run(
        command(tmp_path, model, "out.jsonl", "--dry-run"), capture_output=True, check=True, text=True
    )
    assert f"done already            {n_done}\n" in dry.stdout
    assert "not valid               " in dry.stdout
