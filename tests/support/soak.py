"""A server, a chat and batches at once, for as long as wanted, with what goes wrong in the world.

What is shared by `scripts/soak` and its short run among the tests. POSIX alone has what it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import psutil
from clients import VANISHING, Clients
from terminals import Terminal

_COMMAND: Final = [sys.executable, "-m", "amulet_gguf"]
_DISK: Final = 64 * 1024  # bytes of the one that fills up
# The clock of the server jumps by up to a day, forth and back, each twenty seconds.
_JUMPING: Final = """
import time
_time, _begin = time.time, time.monotonic()
def _jumping():
    n = int((time.monotonic() - _begin) / 20)
    return _time() + (n * 7919 % 25 - 12) * 7200 * (n > 0)
time.time = _jumping
"""


@dataclass(frozen=True)
class Sample:
    """What a process has at a moment: MiB of memory, threads and file handles."""

    minute: float
    rss: float
    threads: int
    files: int


class Watch:
    """The curve of a process."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.samples: list[Sample] = []
        self._process = psutil.Process(pid)
        self._begin = time.monotonic()

    def look(self) -> None:
        """Take a sample; of a process that has ended there is none."""
        with contextlib.suppress(psutil.NoSuchProcess), self._process.oneshot():
            sample = Sample(
                (time.monotonic() - self._begin) / 60,
                self._process.memory_info().rss / 2**20,
                self._process.num_threads(),
                self._process.num_fds(),
            )
            self.samples.append(sample)

    def table(self, n_rows: int = 20) -> str:
        """Return some of the samples, evenly over the time."""
        every = max(1, len(self.samples) // n_rows)
        rows = [*self.samples[:-1:every], self.samples[-1]]
        lines = [f"{s.minute:7.1f} {s.rss:9.1f} {s.threads:8} {s.files:6}" for s in rows]
        return "\n".join([f"{self.name}\n minute   RSS MiB  threads  files", *lines])

    def grown(self, share: float) -> Iterator[str]:
        """Yield what grew over the last two thirds of the time: of medians of its first and last third
        memory by more than a share of it, or threads and files for good."""
        after = self.samples[len(self.samples) // 3 :]
        third = max(1, len(after) // 3)
        first, last = after[:third], after[-third:]
        before, now = (statistics.median(s.rss for s in each) for each in (first, last))
        if now > before * (1 + share):
            yield f"{self.name}: memory grew from {before:.1f} to {now:.1f} MiB"
        for what in ("threads", "files"):
            most, least = max(getattr(s, what) for s in first), min(getattr(s, what) for s in last)
            if least > most:
                yield f"{self.name}: {what} grew from {most} to at least {least}"


def soak(seconds: float, share: float = 0.05, say: Callable[[str], None] = print) -> list[str]:
    """Run all of it and return what went wrong, a line each.

    Args:
        share: by which memory may grow over the last two thirds of the time.
    """
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="amulet-soak-")))
        say("clock: the server's time.time() jumps every 20 s, by a shim (no faketime is used)")
        server, port = stack.enter_context(_server(home))
        chat = stack.enter_context(_Chat(home))
        batches = _Batches(home, stack.enter_context(_small_disk(home, say)))
        clients = Clients(port, 8)

        def progress() -> str:
            n = sum(clients.answered.values())
            runs = f"{batches.n_runs} batches ({batches.n_full} with a full disk)"
            sizes = ", ".join(f"{watch.name} {watch.samples[-1].rss:.0f} MiB" for watch in watches)
            return f"{n} responses, {chat.n_turns} turns of chat, {runs}; {sizes}"

        watches = [Watch("server", server.pid), Watch("chat", chat.pid)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(30, seconds / 30))
            for watch in watches:
                watch.look()
            say(progress())
            if server.poll() is not None:
                return [f"the server ended with {server.returncode}: {_log(home)[-600:]}"]
        clients.stop()
        batches.stop()
        chat.stop()
        wrong = [*clients.failures, *chat.failures, *batches.failures, *_unaccounted(port, clients)]
        for watch in watches:
            watch.look()
            say(watch.table())
            wrong += watch.grown(share)
        say(progress())
        server.terminate()
        server.wait(20)
        wrong += [f"server: {line}"[:300] for line in _log(home).splitlines() if _is_bad(line)][:20]
    return wrong


def _log(home: Path) -> str:
    return (home / "server.log").read_text("utf-8", "replace")


def _is_bad(line: str) -> bool:
    return bool(re.search(r"Traceback|\berror\b.*line \d+|Exception ignored", line, re.IGNORECASE))


@contextlib.contextmanager
def _server(home: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    shim = home / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(_JUMPING)
    paths = os.pathsep.join([str(shim), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "AMULET_HOME": str(home / "server"), "PYTHONPATH": paths}
    options = ["--port", "0", "--ready-json", "--log-level", "warning", "-c", "1024", "-t", "1"]
    with (
        (home / "server.log").open("w") as log,
        subprocess.Popen(
            [*_COMMAND, "serve", *options],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            port = json.loads(process.stdout.readline())["port"]
            while httpx.get(f"http://127.0.0.1:{port}/health").status_code != 200:
                time.sleep(0.2)
            yield process, port
        finally:
            process.kill()


def _unaccounted(port: int, clients: Clients) -> Sequence[str]:
    """Return where the server's count of responses is not the clients' own."""
    deadline = time.monotonic() + 60
    while True:
        page = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        found = re.findall(
            r'^amulet_requests_total\{path="(.*)",status="(.*)"\} (\S+)', page, re.MULTILINE
        )
        counted = {(path, status): int(float(n)) for path, status, n in found}
        own = {(path, str(status)): n for (path, status), n in clients.answered.items()}
        own["/health", "200"] = own.get(("/health", "200"), 0) + 1  # when it began
        wrong = [
            f"{path}, {status}: the clients were answered {own.get((path, status), 0)} times, the "
            f"server counts {counted.get((path, status), 0)}"
            for path, status in sorted(own.keys() | counted.keys())
            if path not in (VANISHING, "/metrics")
            and own.get((path, status), 0) != counted.get((path, status), 0)
        ]
        busy = re.findall(r"^amulet_(?:live|waiting) (\S+)", page, re.MULTILINE)
        if any(float(n) for n in busy):
            wrong.append(f"live and waiting at the end: {busy}")
        if not wrong or time.monotonic() > deadline:
            return wrong
        time.sleep(0.5)


class _Chat:
    """Somebody at a terminal, who asks, changes their mind, and stops answers."""

    _LINES: Final = (
        "What is rain?", "/strength 3", "Tell me about the sea.", "/prefer formal", "And snow?",
        "/why", "/undo", "Why?", "/regen", "/save soak", "/prefer concise", "/show", "Hello",
    )  # fmt: skip

    def __init__(self, home: Path) -> None:
        self.n_turns = 0
        self.failures: list[str] = []
        self._ends = threading.Event()
        self._terminal = Terminal("-n", "20", "-c", "512", "-t", "1", AMULET_HOME=str(home / "chat"))
        self.pid = self._terminal.pid
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Chat:
        self._wait()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._terminal.kill()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _wait(self) -> None:
        """Wait for the prompt. Where the context is full, the oldest turns go."""
        question, prompt = r"turns?\? \[y/N\] *\n.*\s*\Z", r"^> *\n+.* of [\d,]+ tokens\s*\Z"
        while True:
            self._terminal.until_screen(f"{question}|{prompt}", 120)
            if not self._terminal.shows(question):
                return
            self._terminal.press("y\r")
            self._terminal.read(0.5)

    def _run(self) -> None:
        try:
            while not self._ends.is_set():
                line = self._LINES[self.n_turns % len(self._LINES)]
                self._terminal.say(line)
                if self.n_turns % 9 == 2:
                    self._terminal.read(0.5)
                    self._terminal.press("\x03")
                    self._terminal.read(0.5)
                    self._terminal.press("\x15")  # at a question it is "no", and the line comes back
                self._terminal.read(0.3)
                self._wait()
                self.n_turns += 1
                self._terminal.forget()
        except (AssertionError, OSError) as error:
            self.failures.append(f"chat, at {line!r}: {error}"[:2000])


class _Batches:
    """Batches, one after the other; each third one finds its disk full, and goes on elsewhere."""

    def __init__(self, home: Path, small: Path) -> None:
        self.n_runs = self.n_full = 0
        self.failures: list[str] = []
        self._home, self._small = home, small
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        prompts = self._home / "prompts.jsonl"
        records = [{"prompt": f"Say {n}", "max_tokens": 8, "id": "i" * 2000 + str(n)} for n in range(24)]
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        while not self._ends.is_set():
            is_full = self.n_runs % 3 == 0
            output = (self._small if is_full else self._home) / "answers.jsonl"
            done = self._batch(prompts, output, is_full)
            if is_full:
                self.n_full += 1
                if done.returncode != 1 or len(done.stderr.strip().splitlines()[-1]) > 500:
                    self._failed("did not end with 1 on a full disk", done)
                shutil.copy(output, self._home / output.name)  # what it has is whole: it goes on there
                output.unlink()
                output = self._home / output.name
                done = self._batch(prompts, output, False)
            rows = output.read_text().splitlines() if output.exists() else []
            ids = {json.loads(row)["id"] for row in rows}
            if done.returncode != 0 or len(rows) != len(ids) or len(ids) != len(records):
                self._failed(f"ended with {done.returncode} and {len(rows)} rows", done)
            output.unlink(missing_ok=True)
            self.n_runs += 1

    def _failed(self, what: str, done: subprocess.CompletedProcess[str]) -> None:
        self.failures.append(f"batch {what}: {done.stderr[-600:]}")

    def _batch(self, prompts: Path, output: Path, is_full: bool) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            if is_full and not os.path.ismount(self._small):
                resource.setrlimit(resource.RLIMIT_FSIZE, (_DISK, resource.RLIM_INFINITY))

        return subprocess.run(
            [*_COMMAND, "batch", str(prompts), "-o", str(output), "-t", "1", "--parallel", "4"],
            capture_output=True,
            text=True,
            env={**os.environ, "AMULET_HOME": str(self._home / "batch")},
            stdin=subprocess.DEVNULL,
            preexec_fn=limit,
        )


@contextlib.contextmanager
def _small_disk(home: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Mount a small tmpfs, or where that is not allowed have files bounded to its size."""
    folder = home / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
        is_mounted = done.returncode == 0
    except OSError:
        is_mounted = False
    say(f"full disk: {'a tmpfs of 64 KiB' if is_mounted else 'RLIMIT_FSIZE (mounting is not allowed)'}")
    try:
        yield folder
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
