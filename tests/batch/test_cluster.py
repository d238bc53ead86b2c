"""A batch over Ray workers: real ones, two of them, on this machine."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from fixture_types import Tiny

from amulet_gguf.amulet import Amulet
from amulet_gguf.batch.cluster import Place, _connect, _import_ray, choose_places, ray_answers
from amulet_gguf.batch.records import Record
from amulet_gguf.batch.run import answers, result
from amulet_gguf.cli import main
from amulet_gguf.errors import EngineError, ModelNotFoundError, SettingError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.settings import Settings


def node(name: str, cpus: int, gpus: int = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


@pytest.mark.parametrize(
    ("n_records", "n_workers", "n_threads", "use_gpus", "expected"),
    [
        (99, None, None, False, [Place("a", 8, 0, 1), Place("b", 4, 0, 1), Place("g", 2, 0, 1)]),
        (99, None, 4, False, [Place("a", 4, 0, 2), Place("b", 4, 0, 1), Place("a", 4, 0, 2)]),
        (99, None, None, True, [Place("g", 1, 1, 2)] * 2),
        (99, 1, None, True, [Place("g", 2, 1, 1)]),
        (99, 2, None, False, [Place("a", 8, 0, 1), Place("b", 4, 0, 1)]),
        (99, 4, None, False,
         [Place("a", 4, 0, 2), Place("b", 4, 0, 1), Place("g", 2, 0, 1), Place("a", 4, 0, 2)]),
        (1, None, None, False, [Place("a", 8, 0, 1)]),
        (1, 9, 1, False, [Place("a", 1, 0, 1)]),
    ],
)  # fmt: skip
def test_workers_are_spread_over_the_nodes_that_can_take_them(
    n_records: int, n_workers: int | None, n_threads: int | None, use_gpus: bool, expected: list[Place]
) -> None:
    nodes = [
        node("a", 8),
        node("dead", 64, 8, alive=False),
        node("head", 0),
        node("b", 4),
        node("g", 2, 4),
    ]
    assert choose_places(nodes, n_records, n_workers, n_threads, use_gpus) == expected


@pytest.mark.parametrize(
    ("n_workers", "n_threads", "use_gpus", "complaint"),
    [
        (15, None, False, "room for 14 workers of 1 CPUs"),
        (None, 9, False, "room for 0 workers of 9 CPUs"),
        (3, None, True, "room for 2 workers of 1 CPUs and a GPU"),
        (None, 0, False, "n_threads must be at least 1"),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    n_workers: int | None, n_threads: int | None, use_gpus: bool, complaint: str
) -> None:
    nodes = [node("a", 8), node("b", 4), node("g", 2, 4)]
    with pytest.raises(SettingError, match=complaint):
        choose_places(nodes, 99, n_workers, n_threads, use_gpus)
    with pytest.raises(SettingError, match="room for 0"):
        choose_places([], 1, None, None, False)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingError, match=r"pip install 'amulet-gguf\[ray\]'"):
        _import_ray()


@pytest.mark.parametrize("address", ["", "nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "bad://x"])
def test_an_address_without_a_cluster_is_told_at_once(address: str) -> None:
    begin = time.monotonic()
    with pytest.raises(SettingError, match="no Ray cluster at") as caught:
        _connect(_import_ray(), address)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 15


def test_workers_without_ray_are_misuse(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("{}")
    made = CliRunner().invoke(
        main, ["batch", f"{tmp_path}/in", "-o", f"{tmp_path}/out", "--workers", "2"]
    )
    assert made.exit_code == 2
    assert "--workers needs --ray" in made.stderr


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray, connected to a cluster of two CPUs that exists for these tests."""
    ray = _import_ray()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


Answers = Callable[..., Iterator[tuple[Record, dict[str, Any]]]]


@pytest.fixture
def on_two_workers(ray: Any, tiny: Tiny) -> Answers:
    def begin(records: list[Record], **more: Any) -> Iterator[tuple[Record, dict[str, Any]]]:
        fields = {"model": tiny("llama"), "n_ctx": 2048, "n_threads": 1}
        loading = Loading(**{name: more.pop(name, each) for name, each in fields.items()})
        options = {"loading": loading, "n_sequences": 4, "parallel": 1, "n_workers": 2}
        return ray_answers(records, "auto", **{**options, **more})

    return begin


def some_records(count: int, max_tokens: int = 30) -> list[Record]:
    settings = Settings(prefer="concise", max_tokens=max_tokens)
    return [Record(n, settings, f"What is {n}?", extra={"id": f"r{n}"}) for n in range(1, count + 1)]


def workers(doing: str = "") -> list[psutil.Process]:
    """The processes of the workers on this machine that were started by this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(f"ray::_Worker{doing}"):
                found.append(process)
    return found


def assert_workers_end() -> None:
    deadline = time.monotonic() + 10
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_answers_are_those_of_one_process(on_two_workers: Answers, tiny: Tiny) -> None:
    records = [
        *some_records(6),
        Record(7, error="not JSON"),
        Record(8, Settings(), "word " * 5000, extra={"id": "long"}),
    ]
    with Amulet.load(tiny("llama"), n_ctx=2048, n_sequences=2, n_threads=1) as amulet:
        expected = {r.line: result(r, answer) for r, answer in answers(amulet, records, 1)}
    counts: list[int] = []
    got = [(r.line, outcome) for r, outcome in on_two_workers(records, on_step=counts.append)]
    assert dict(got) == expected
    assert len(got) == len(records)
    assert [line for line, outcome in got if "error" in outcome] == [7, 8]
    tokens = sum(outcome["usage"]["completion_tokens"] for _, outcome in got if "text" in outcome)
    assert counts[-1] == tokens > 0
    assert_workers_end()  # closed with the iterator, and the cluster is still there


def test_a_killed_worker_loses_and_repeats_nothing(on_two_workers: Answers) -> None:
    records = some_records(40, max_tokens=100)
    got: list[tuple[int, dict[str, Any]]] = []
    killed: list[psutil.Process] = []
    for record, outcome in on_two_workers(records, parallel=4):
        got.append((record.line, outcome))
        if len(got) in (4, 12):  # one of them, then all
            for process in workers()[: 1 if len(got) == 4 else None]:
                process.send_signal(signal.SIGKILL)
                killed.append(process)
    assert len(set(killed)) >= 2
    assert sorted(line for line, _ in got) == [record.line for record in records]
    assert all("text" in outcome for _, outcome in got)


def test_a_record_that_ends_every_worker_becomes_an_error(on_two_workers: Answers) -> None:
    is_over = threading.Event()
    killed: set[psutil.Process] = set()

    def kill() -> None:
        while not is_over.wait(0.02):
            for process in set(workers(".answer")) - killed:
                killed.add(process)
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        [(record, outcome)] = on_two_workers(some_records(1, max_tokens=1900))
    finally:
        is_over.set()
        killer.join()
    assert len(killed) == 3
    assert record.line == 1
    assert outcome["error"].startswith("its worker ended each of 3 times it was tried: ")
    assert outcome["id"] == "r1"
    assert "\n" not in outcome["error"]


def test_a_model_that_no_worker_can_load_is_one_line(on_two_workers: Answers, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("this is not a model")
    with pytest.raises(EngineError, match=r"cannot load the model: .* is not a GGUF file") as caught:
        list(on_two_workers(some_records(2), model=tmp_path / "model.gguf"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        list(on_two_workers(some_records(2), model=tmp_path / "none.gguf"))
    assert_workers_end()


def test_the_command_goes_on_where_it_was_interrupted(ray: Any, tiny: Tiny, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps({"id": n, "prompt": f"What is {n}?", "max_tokens": 400}) for n in range(30)]
    prompts.write_text("\n".join([*lines, "not JSON"]))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "amulet_gguf", "batch", str(prompts), "-o", str(output),
               "-m", str(tiny("llama")), "--ray", address, "--workers", "2", "-t", "1",
               "--parallel", "2"]  # fmt: skip

    def done() -> list[str]:
        return output.read_text().splitlines() if output.exists() else []

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        while len(done()) < 6 and first.poll() is None:
            time.sleep(0.02)
        begin = time.monotonic()
        first.send_signal(signal.SIGINT)
        out, err = first.communicate()
    assert first.returncode == 130, err
    assert time.monotonic() - begin < 10
    assert out == ""
    assert "run the same command to go on" in err
    kept = done()
    assert 5 <= len(kept) < 31  # the last one may have been taken back

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert second.stdout == ""
    assert f"{31 - len(kept)} records" in second.stderr
    assert len(second.stderr.splitlines()) <= 2
    results = [json.loads(line) for line in done()]
    assert [each["line"] for each in results] == list(range(1, 32))
    assert {json.loads(line)["line"]: json.loads(line) for line in kept}.items() <= {
        each["line"]: each for each in results
    }.items()
    assert [each["line"] for each in results if "error" in each] == [31]
    assert all(each["Alive"] for each in ray.nodes())
