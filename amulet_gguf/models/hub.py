"""Fetching models from the Hugging Face hub, or a mirror of it ($HF_ENDPOINT)."""

from __future__ import annotations

import difflib
import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from amulet_gguf.errors import DownloadError, SettingError
from amulet_gguf.llama.gguf import SPLIT
from amulet_gguf.models.catalogue import CATALOGUE
from amulet_gguf.system.platforms import open_without_waiting, remove_lock

#: Quantizations in the order in which one is chosen where none is named.
PREFERRED: Final = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q8_0", "Q3_K_M")
_TRIES: Final = 4
_TIMEOUT: Final = 30.0  # seconds without an answer; the client would wait forever
_SPARE: Final = 64 * 2**20  # bytes of disk that are left alone
_PREFIXES: Final = ("https://huggingface.co/", "hf.co/", "huggingface.co/")
_WORD: Final = r"[A-Za-z0-9][\w.-]*"
_SOURCE: Final = re.compile(
    rf"(?P<repo>{_WORD}/{_WORD})(?:/tree/main|(?:/(?:blob|resolve)/main)?/(?P<file>[^?]+\.gguf)"
    r"(?:\?.*)?|:(?P<quantization>[\w.-]+))?/?",
    re.ASCII,
)

#: Called with the file's name, and its bytes that are here and in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """What to fetch.

    Attributes:
        repo: "owner/repo".
        file: one file of it, or None.
        quantization: or one of its quantizations, or None for a usual one.
    """

    repo: str
    file: str | None = None
    quantization: str | None = None


@dataclass(frozen=True)
class _Remote:
    name: str
    n_bytes: int
    sha256: str


def parse_source(name: str) -> Source:
    """Read OWNER/REPO, OWNER/REPO:QUANTIZATION, OWNER/REPO/FILE.gguf, or a name of the catalogue.

    The hub's links to a repository or a file are read too.

    Raises:
        SettingError: it is none of them.
    """
    written = name.strip()
    for prefix in _PREFIXES:
        written = written.removeprefix(prefix)
    written = CATALOGUE.get(written.lower(), written)
    match = _SOURCE.fullmatch(written)
    if match and ".." not in PurePosixPath(match["file"] or "").parts:
        return Source(match["repo"], match["file"], match["quantization"])
    near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"short names are {', '.join(CATALOGUE)}"
    raise SettingError(f"{name!r} is neither OWNER/REPO, OWNER/REPO:Q4_K_M nor a short name: {hint}")


def pull(source: Source, folder: Path, progress: Progress = lambda *_: None) -> Path:
    """Fetch a model into `folder/OWNER/REPO/`, and return its (first) file.

    What is there already with the hub's digest is not fetched again (`progress` is then not called), and
    what an earlier try left is gone on from. A file gets its name only when all of it is on disk and
    has the digest that the hub says.

    Raises:
        DownloadError: with what to do about it. What has been fetched so far is kept.
        SettingError: the hub has no such names.
    """
    target = folder / source.repo
    partial = folder / ".partial"
    try:
        with _hub_errors(source.repo):
            remotes = _choose(source, _list(source.repo))
        missing = [remote for remote in remotes if not _is_here(target / remote.name, remote)]
        if not missing:
            return target / remotes[0].name
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial, missing):
            _check_disk(source.repo, missing, partial)
            for remote in missing:
                _fetch(source.repo, remote, partial / remote.sha256, progress)
            # All parts of a split model appear together, the one that it is found by last.
            for remote in reversed(missing):
                (target / remote.name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial / remote.sha256, target / remote.name)
        with suppress(OSError):  # another pull may be at work in it
            partial.rmdir()
    except OSError as error:
        raise _disk_error(error, folder) from None
    return target / remotes[0].name


@contextmanager
def _locked(partial: Path, remotes: list[_Remote]) -> Iterator[None]:
    """Keep other processes from fetching the same files."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        for remote in remotes:
            path = partial / f".{remote.sha256}.lock"
            try:
                stack.enter_context(FileLock(path, timeout=0))
            except Timeout:
                raise DownloadError(
                    f"{remote.name} is being pulled by another process: wait for it"
                ) from None
            stack.callback(remove_lock, path)
        yield


def _check_disk(repo: str, remotes: list[_Remote], partial: Path) -> None:
    needed = sum(max(0, remote.n_bytes - _size(partial / remote.sha256)) for remote in remotes)
    free = shutil.disk_usage(partial).free - _SPARE
    if needed > free:
        raise DownloadError(
            f"{repo} needs {needed / 1e9:.2f} GB and {max(0, free) / 1e9:.2f} GB of disk are free in "
            f"{partial.parent}: make room, or set AMULET_HOME to another disk"
        )


def _list(repo: str) -> list[_Remote]:
    """Return the model files of a repository."""
    from huggingface_hub import HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    info = HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT)
    found = []
    for sibling in info.siblings or ():
        name, lfs = sibling.rfilename, sibling.lfs
        path = PurePosixPath(name)
        if path.suffix != ".gguf" or lfs is None or path.name.startswith(("mmproj", "imatrix")):
            continue
        is_inside = not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\:")
        if is_inside and name.isprintable() and re.fullmatch(r"[0-9a-f]{64}", lfs.sha256):
            found.append(_Remote(name, lfs.size, lfs.sha256))
    return sorted(found, key=lambda remote: remote.name)


def _choose(source: Source, remotes: list[_Remote]) -> list[_Remote]:
    """Return the files to fetch: one, or all parts of one that is split."""
    if not remotes:
        raise DownloadError(f"{source.repo} has no GGUF file: choose a repository that has")
    groups: dict[str, list[_Remote]] = {}
    for remote in remotes:
        groups.setdefault(_group(remote.name), []).append(remote)
    if source.file is not None:
        if wanted := groups.get(_group(source.file)):
            return _whole(wanted)
        near = difflib.get_close_matches(source.file, [remote.name for remote in remotes], n=3, cutoff=0)
        raise DownloadError(f"{source.repo} has no file {source.file}: it has {', '.join(near)}")
    wishes = (source.quantization,) if source.quantization else PREFERRED
    for wish in wishes:
        named = re.compile(rf"(?<![A-Za-z0-9]){re.escape(wish)}(?![A-Za-z0-9_])", re.IGNORECASE)
        fitting = [files for base, files in groups.items() if named.search(base)]
        if len(fitting) == 1:
            return _whole(fitting[0])
        if fitting:
            names = ", ".join(files[0].name for files in fitting[:10])
            raise DownloadError(f"{wish} could be any of {names}: name one as {source.repo}/FILE.gguf")
    if len(groups) == 1 and source.quantization is None:
        return _whole(next(iter(groups.values())))
    names = ", ".join(files[0].name for files in list(groups.values())[:20])
    raise DownloadError(f"{source.repo} has no {' or '.join(wishes[:3])}: it has {names}")


def _group(name: str) -> str:
    """Return what all parts of a split model have in common."""
    return SPLIT.sub(r"-of-\2", name.removesuffix(".gguf"))


def _whole(files: list[_Remote]) -> list[_Remote]:
    """Return the files of a model if no part is missing."""
    parts = [SPLIT.search(file.name.removesuffix(".gguf")) for file in files]
    numbers = [(int(part[1]), int(part[2])) for part in parts if part]
    if numbers and numbers != [(i, numbers[0][1]) for i in range(1, numbers[0][1] + 1)]:
        raise DownloadError(
            f"the hub has {len(numbers)} of the {numbers[0][1]} parts of {files[0].name}: choose another"
        )
    return files


def _fetch(repo: str, remote: _Remote, path: Path, progress: Progress) -> None:
    """Fetch one file to a path named by its digest, from where an earlier try stopped, and verify it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with open(path, "ab", opener=open_without_waiting) as file:
        if file.tell() > remote.n_bytes:
            file.truncate(0)
        progress(remote.name, file.tell(), remote.n_bytes)
        for attempt in range(_TRIES):
            if file.tell() == remote.n_bytes:
                break
            try:
                with _hub_errors(repo):
                    http_get(
                        hf_hub_url(repo, remote.name),
                        file,
                        resume_size=file.tell(),
                        headers=build_hf_headers(),
                        expected_size=remote.n_bytes,
                        tqdm_class=_bar(remote, progress),
                    )
            except DownloadError as error:
                is_broken = error.__cause__ is not None  # else something was refused
                if attempt == _TRIES - 1 or not is_broken:
                    raise
        file.flush()
        os.fsync(file.fileno())
    if _digest(path) != remote.sha256:
        path.unlink()
        raise DownloadError(
            f"{remote.name} did not arrive as the hub has it (sha256): it was deleted, pull it again"
        )


def _bar(remote: _Remote, progress: Progress) -> Any:
    """Return a progress bar for the hub's client that shows nothing and reports instead."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            super().__init__(disable=True)
            self._done = initial
            progress(remote.name, self._done, remote.n_bytes)

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._done > remote.n_bytes:  # or a broken mirror could fill the disk
                raise DownloadError(f"{remote.name} is longer than the hub says: pull it again later")
            progress(remote.name, self._done, remote.n_bytes)

    return Bar


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line with the cure."""
    from huggingface_hub import errors

    try:
        yield
    except DownloadError:
        raise
    except errors.HFValidationError:
        raise SettingError(f"{repo!r} cannot be a repository of the hub: check the name") from None
    except errors.GatedRepoError:
        raise DownloadError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"the hub has no repository {repo} for you: check the name; if it is private, set HF_TOKEN"
        ) from None
    except errors.EntryNotFoundError:
        raise DownloadError(f"the hub no longer has that file of {repo}: pull it again") from None
    except errors.OfflineModeIsEnabled:
        raise DownloadError("HF_HUB_OFFLINE is set: unset it to pull models") from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        cure = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise DownloadError(f"the hub answered {status or 'with an error'} for {repo}: {cure}") from None
    except Exception as error:
        is_of_network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError))
        if isinstance(error, OSError) and error.errno and not is_of_network:
            raise  # the disk's
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise DownloadError(
            f"the connection to the hub failed ({reason}): run it again, it goes on where it stopped"
        ) from error


def _disk_error(error: OSError, folder: Path) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"the disk of {folder} is full: make room and run it again, it goes on")
    return DownloadError(f"{error.filename or folder} cannot be written: {error.strerror or error}")


def _is_here(path: Path, remote: _Remote) -> bool:
    """Whether a file is there as the hub has it now: a new version may have the old one's size."""
    return _size(path) == remote.n_bytes and _digest(path) == remote.sha256


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
