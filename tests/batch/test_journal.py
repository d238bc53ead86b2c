"""The output of a batch: whatever happens in the middle, whole results stay and nothing else does."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amulet_gguf.batch.journal import Journal
from amulet_gguf.errors import BatchError

KEYS = {line: f"{line:016x}" for line in (1, 2, 3, 5, 8)}
RESULTS: dict[int, dict[str, Any]] = {
    1: {"id": "a", "text": "one"},
    2: {"text": 'é ☕ \u2028 "quoted" \\ud800\nsecond line'},
    3: {"id": None, "error": "the prompt is empty"},
    5: {"text": "", "usage": {"completion_tokens": 0}},
    8: {"nested": [[{}], 1.5], "text": "x" * 300},
}
FOREIGN = [
    b"hello\n",
    b"hello",
    b"\n",
    b"\n\n",
    b"{}\n",
    b"{}\n{}\n",
    b"[]\n",
    b"null\n",
    b"[1, 2]",
    b'{"text": "a result of something else"}',
    b'{"line": 1, "text": "one"}\n',
    b'{"line": 1, "text": "one", "key": "other settings!!"}\n',
    b'{"line": 1, "text": "one", "key": "other settings!!"}',
    b'{"line": 4, "text": "of no record", "key": "0000000000000004"}\n',
    b'{"line": 7, "colour": "red"}',
    b'{"line": [1], "key": "0000000000000001"}\n',
    b'{"line": 1, "key": ["0000000000000001"]}\n',
    b'{"line": 9, "text": "cut here and then an end of li\n',
    b"\0\n",
    b"\0\0hello",
    b"hello\0\0",
    b"\xef\xbb\xbf",
    b"\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b"\x89PNG\r\n\x1a\n\0\0\0",
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def write(path: Path, order: tuple[int, ...] = (1, 2, 3, 5, 8)) -> bytes:
    """Write the results in an order; return what the file holds then."""
    with Journal(path, KEYS) as journal:
        for line in order:
            journal.append(line, RESULTS[line])
    return path.read_bytes()


def expected(lines: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"line": line, **RESULTS[line], "key": KEYS[line]} for line in lines]


def assert_closed(path: Path, *names: str) -> None:
    """Nothing but the file itself is left in its folder; what a kill leaves of sorting is hidden."""
    found = [name for name in os.listdir(path.parent) if not re.fullmatch(r"\.[0-9a-f]+\.tmp", name)]
    assert sorted(found) == sorted([path.name, *names])


# Writing and reading


def test_results_are_on_disk_before_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with Journal(path, KEYS) as journal:
        for line, result in RESULTS.items():
            journal.append(line, result)
            assert synced[-1] == path.read_bytes()
    assert len(synced) == len(RESULTS)
    assert [json.loads(line) for line in synced[-1].splitlines()] == expected(tuple(RESULTS))
    assert_closed(path)


def test_a_new_journal_goes_on_where_the_last_one_stopped(path: Path) -> None:
    for line, done in ((3, set()), (1, {3}), (8, {1, 3})):
        with Journal(path, KEYS) as journal:
            assert journal.done == done
            journal.append(line, RESULTS[line])
            assert journal.done == done | {line}
    with Journal(path, KEYS) as journal:
        assert list(journal.results()) == expected((1, 3, 8))
    assert [json.loads(line)["line"] for line in path.read_bytes().splitlines()] == [3, 1, 8]
    assert_closed(path)


@given(
    st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.floats(allow_nan=False), max_size=3)
)
def test_any_text_comes_back_as_it_went_in(extra: dict[str, Any]) -> None:
    extra = {name: value for name, value in extra.items() if name not in ("line", "key")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.jsonl")
        for number in range(2):
            with Journal(path, KEYS) as journal:
                assert len(journal.done) == number
                journal.append(number + 1, extra)
                assert list(journal.results()) == [
                    {"line": n + 1, **extra, "key": KEYS[n + 1]} for n in range(number + 1)
                ]
        assert path.read_bytes().count(b"\n") == 2


def test_lone_surrogates_survive_as_escapes(path: Path) -> None:
    result = {"id": "\ud800 \\ud800 \udfff\ud800", "\udead": 'a"\\\udc00'}
    with Journal(path, KEYS) as journal:
        journal.append(1, result)
    path.read_bytes().decode("utf-8")
    with Journal(path, KEYS) as journal:
        assert list(journal.results()) == [{"line": 1, **result, "key": KEYS[1]}]


def test_results_without_a_record_are_a_mistake_of_the_caller(path: Path) -> None:
    with Journal(path, KEYS) as journal:
        journal.append(1, RESULTS[1])
        with pytest.raises(KeyError):
            journal.append(4, {"text": "x"})
    assert path.read_bytes().count(b"\n") == 1


# Torn writes


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 4096], ids=["cut", "zero", "zeros"])
@pytest.mark.parametrize("before", [(), (3,), (3, 1)], ids=len)
@pytest.mark.parametrize("torn", [2, 5])
def test_a_line_torn_at_any_byte_is_cut_off(
    path: Path, before: tuple[int, ...], torn: int, tail: bytes
) -> None:
    whole = write(path, (*before, torn))
    kept = b"".join(whole.splitlines(keepends=True)[: len(before)])
    # As a whole line followed by zeros the last result is valid, and the zeros alone go.
    for size in range(len(kept), len(whole) + bool(tail)):
        path.write_bytes(whole[:size] + tail)
        with Journal(path, KEYS) as journal:
            left = whole if size == len(whole) else kept
            assert path.read_bytes() == left
            assert journal.done == {*before, *((torn,) if left == whole else ())}
            if left == kept:
                journal.append(torn, RESULTS[torn])
            assert list(journal.results()) == expected(tuple(sorted((*before, torn))))
        assert path.read_bytes() == whole
    assert_closed(path)


@given(st.integers(0, 400), st.binary(max_size=3))
def test_damage_is_cut_or_refused_and_never_loses_whole_results(size: int, junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out.jsonl")
        whole = write(path, (2, 1, 8))
        damaged = whole[:size] + junk
        path.write_bytes(damaged)
        try:
            Journal(path, KEYS).close()
        except BatchError:
            assert path.read_bytes() == damaged
        else:
            left = path.read_bytes()
            assert damaged.startswith(left)
            lines = whole[: min(size, len(whole))].count(b"\n")
            assert left.splitlines()[:lines] == whole.splitlines()[:lines]
            assert left == b"" or left.endswith(b"\n")


def killed_at(call: str, path: Path, body: str) -> None:
    """Run a body with a journal of three results in a process that dies in a call."""
    script = f"""
import os, signal
from pathlib import Path
from amulet_gguf.batch.journal import Journal
keys = {KEYS!r}
results = {RESULTS!r}
journal = Journal(Path({str(path)!r}), keys)
for line in (5, 1, 3):
    journal.append(line, results[line])
real_replace, real_fsync = os.replace, os.fsync
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
{call}
{body}
raise SystemExit("it was not killed")
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("call", "is_sorted"),
    [
        ("os.fsync = die", False),
        ("os.replace = die", False),
        ("os.replace = lambda *names: (real_replace(*names), die())", True),
    ],
    ids=["written", "before", "after"],
)
def test_a_kill_while_sorting_leaves_all_results_in_one_order_or_the_other(
    path: Path, call: str, is_sorted: bool
) -> None:
    killed_at(call, path, "journal.sort()")
    order = [json.loads(line)["line"] for line in path.read_bytes().splitlines()]
    assert order == ([1, 3, 5] if is_sorted else [5, 1, 3])
    with Journal(path, KEYS) as journal:
        assert list(journal.results()) == expected((1, 3, 5))
        journal.sort()
        journal.append(2, RESULTS[2])
    assert [json.loads(line)["line"] for line in path.read_bytes().splitlines()] == [1, 3, 5, 2]
    assert_closed(path)


def test_a_kill_before_the_result_is_on_disk_loses_that_one_at_most(path: Path) -> None:
    killed_at("os.fsync = die", path, "journal.append(8, results[8])")
    with Journal(path, KEYS) as journal:
        assert journal.done in ({1, 3, 5}, {1, 3, 5, 8})


# Files of others


@pytest.mark.parametrize("data", FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("has_results", [False, True])
def test_a_file_of_others_is_refused_and_left_as_it_is(
    path: Path, data: bytes, has_results: bool
) -> None:
    content = (write(path, (2, 3)) if has_results else b"") + data
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(BatchError, match="choose another output") as caught:
        Journal(path, KEYS)
    assert len(str(caught.value).splitlines()) == 1
    assert f"line {1 + 2 * has_results}," in str(caught.value)
    assert path.read_bytes() == content
    assert path.stat().st_mtime == 1
    assert_closed(path)


def test_results_of_other_settings_are_refused_even_between_ours(path: Path) -> None:
    content = write(path)
    changed = {**KEYS, 3: "0" * 15 + "f"}
    with pytest.raises(BatchError, match="line 3,"):
        Journal(path, changed)
    with pytest.raises(BatchError, match="line 5,"):
        Journal(path, {line: KEYS[line] for line in (1, 2, 3, 5)})
    assert path.read_bytes() == content


def test_a_result_that_is_there_twice_is_refused(path: Path) -> None:
    content = write(path, (1, 2))
    path.write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(BatchError, match="record 1 twice"):
        Journal(path, KEYS)
    assert path.read_bytes() == content + content.splitlines(keepends=True)[0]
    assert_closed(path)


@pytest.mark.parametrize("data", [b"", b"\0" * 4096])
def test_an_empty_file_is_as_good_as_none(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert write(path, (1,)).count(b"\n") == 1


# Two at once


def test_a_second_writer_is_refused_in_one_line(path: Path) -> None:
    with Journal(path, KEYS) as first:
        first.append(1, RESULTS[1])
        before = path.read_bytes()
        for _ in range(2):
            with pytest.raises(BatchError, match="another process") as caught:
                Journal(path, KEYS)
            assert len(str(caught.value).splitlines()) == 1
        assert path.read_bytes() == before
        first.append(2, RESULTS[2])
    with Journal(path, KEYS) as journal:
        assert journal.done == {1, 2}
    assert_closed(path)


def test_a_second_writer_is_refused_by_another_name_of_the_file(path: Path) -> None:
    write(path, (1,))
    link = path.with_name("link.jsonl")
    link.symlink_to(path.name)
    for held, other in ((path, link), (link, path)):
        with Journal(held, KEYS), pytest.raises(BatchError, match="another process"):
            Journal(other, KEYS)


def test_who_opens_while_another_closes_is_not_robbed_of_the_lock(path: Path) -> None:
    """Between giving up a lock and removing its file, the next one may have taken it."""
    first = Journal(path, KEYS)
    release = first._lock.release
    second: list[Journal] = []

    def release_and_open() -> None:
        release()
        try:
            second.append(Journal(path, KEYS))
        except BatchError:
            return

    with mock.patch.object(first._lock, "release", release_and_open):
        first.close()
    if not second:
        second.append(Journal(path, KEYS))
    try:
        with pytest.raises(BatchError, match="another process"):
            Journal(path, KEYS)
    finally:
        for journal in second:
            journal.close()
    assert_closed(path)


# Failures of the system


class Failing:
    """A file that fails in `write` after some bytes, as a full disk does."""

    def __init__(self, file: Any, left: int) -> None:
        self._file = file
        self.left = left

    def write(self, data: memoryview) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n: int = self._file.write(data[: self.left])
        self.left -= n
        return n

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 9, 30, 60])
def test_a_full_disk_leaves_what_was_there_and_a_journal_that_works(path: Path, room: int) -> None:
    with Journal(path, KEYS) as journal:
        journal.append(2, RESULTS[2])
        before = path.read_bytes()
        real = journal._file
        for _ in range(2):
            journal._file = Failing(real, room)  # type: ignore[assignment]
            with pytest.raises(BatchError, match=r"No space left.*run the same command") as caught:
                journal.append(8, RESULTS[8])
            assert len(str(caught.value).splitlines()) == 1
            assert path.read_bytes() == before
            assert journal.done == {2}
        journal._file = real
        journal.append(8, RESULTS[8])
        journal.append(1, RESULTS[1])
        assert list(journal.results()) == expected((1, 2, 8))
    assert_closed(path)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_result_that_is_not_surely_on_disk_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_: int) -> None:
        raise error

    with Journal(path, KEYS) as journal:
        journal.append(3, RESULTS[3])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(BatchError if isinstance(error, OSError) else type(error)):
                journal.append(1, RESULTS[1])
        assert path.read_bytes() == before
        assert journal.done == {3}
        journal.append(1, RESULTS[1])
        journal.sort()
        assert list(journal.results()) == expected((1, 3))
    assert_closed(path)


def test_a_write_of_few_bytes_at_a_time_is_completed(path: Path) -> None:
    with Journal(path, KEYS) as journal:
        real = journal._file

        class Slow(Failing):
            def write(self, data: memoryview) -> int:
                self.left = 3
                return super().write(data)

        journal._file = Slow(real, 3)  # type: ignore[assignment]
        journal.append(2, RESULTS[2])
        journal._file = real
        assert list(journal.results()) == expected((2,))


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder in which nothing can be made; the superuser becomes another for that."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "there.jsonl").write_bytes(b"")
        (folder / "there.jsonl").chmod(0o644)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if is_root:
                os.seteuid(0)
            folder.chmod(0o755)


@pytest.mark.parametrize("name", ["new.jsonl", "there.jsonl"])
def test_a_folder_that_is_read_only_is_told_in_one_line(read_only: Path, name: str) -> None:
    with pytest.raises(BatchError, match="cannot be written: Permission denied") as caught:
        Journal(read_only / name, KEYS)
    assert len(str(caught.value).splitlines()) == 1
    assert os.listdir(read_only) == ["there.jsonl"]


def test_what_is_no_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to(os.devnull)
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "folder", tmp_path / "device", tmp_path / "file" / "out.jsonl"):
        with pytest.raises(BatchError) as caught:
            Journal(path, KEYS)
        assert str(path) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["device", "file", "folder"]


# Sorting


@pytest.mark.parametrize("order", [(8, 5, 3, 2, 1), (1, 2, 8, 3, 5), (2, 1)])
def test_sorting_puts_all_results_into_the_order_of_the_input(
    path: Path, order: tuple[int, ...]
) -> None:
    unsorted = write(path, order)
    with Journal(path, KEYS) as journal:
        assert list(journal.results()) == expected(tuple(sorted(order)))
        journal.sort()
        assert [json.loads(line) for line in path.read_bytes().splitlines()] == expected(
            tuple(sorted(order))
        )
        assert sorted(path.read_bytes().splitlines()) == sorted(unsorted.splitlines())
        rest = sorted(set(KEYS) - set(order))
        for line in rest:
            journal.append(line, RESULTS[line])
        assert list(journal.results()) == expected(tuple(KEYS))
        journal.sort()
    assert path.read_bytes() == write(path.with_name("other.jsonl"))


@pytest.mark.parametrize("order", [(), (3,), (1, 2, 3, 5, 8)])
def test_sorting_what_is_sorted_touches_nothing(path: Path, order: tuple[int, ...]) -> None:
    write(path, order)
    os.utime(path, (1, 1))
    before = path.stat()
    with Journal(path, KEYS) as journal:
        journal.sort()
        journal.sort()
    after = path.stat()
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_sort_that_fails_leaves_the_complete_file_and_a_journal_that_works(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    before = write(path, (5, 2, 1))

    def fail(*_: object) -> None:
        raise error

    with Journal(path, KEYS) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            if isinstance(error, OSError):
                with pytest.raises(BatchError, match="complete and could not be sorted"):
                    journal.sort()
            else:
                with pytest.raises(KeyboardInterrupt):
                    journal.sort()
        assert path.read_bytes() == before
        journal.append(3, RESULTS[3])
        assert list(journal.results()) == expected((1, 2, 3, 5))
        journal.sort()
        assert list(journal.results()) == expected((1, 2, 3, 5))
    assert_closed(path)


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target.jsonl"
    path.symlink_to(target)
    with Journal(path, KEYS) as journal:
        for line in (3, 1, 2):
            journal.append(line, RESULTS[line])
        journal.sort()
        journal.append(5, RESULTS[5])
    assert path.is_symlink()
    assert os.listdir(target.parent) == ["target.jsonl"]
    assert [json.loads(line) for line in target.read_bytes().splitlines()] == expected((1, 2, 3, 5))
    assert_closed(path, "elsewhere")


def test_a_private_file_stays_private(path: Path) -> None:
    write(path, (2, 1))
    path.chmod(0o600)
    with Journal(path, KEYS) as journal:
        journal.sort()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_of_another_that_is_named_like_ours_is_left_alone(path: Path) -> None:
    other = path.with_name("out.jsonl.sorted")
    other.write_text("mine")
    write(path, (2, 1))
    with Journal(path, KEYS) as journal:
        journal.sort()
    assert other.read_text() == "mine"


def test_the_lock_is_given_up_whatever_opening_ends_in(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, (1,))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Journal(path, KEYS)
    assert_closed(path)
    with Journal(path, KEYS) as journal:
        assert journal.done == {1}
