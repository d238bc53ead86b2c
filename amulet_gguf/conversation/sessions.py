"""Saved conversations: what was said as JSON, and beside it, if wanted, its KV cache.

The second file makes a long conversation resume at once. It is never needed: if it is damaged, or of
another model, type or version of llama.cpp, the conversation is read again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from amulet_gguf.errors import AmuletError, SessionError, shown
from amulet_gguf.home.files import make_folder, read_file, replacing, write_atomically
from amulet_gguf.home.paths import sessions_folder
from amulet_gguf.prompts.messages import THOUGHT
from amulet_gguf.settings import SETTINGS, Settings

if TYPE_CHECKING:
    from amulet_gguf.prompts.template import Encoded

VERSION: Final = 1
_FORMAT: Final = "amulet-session"
_MAX_BYTES: Final = 64 * 2**20  # of the JSON: far more than any context holds
_NAME: Final = re.compile(r"[\w][\w.-]{0,99}")
_MAX_BYTES_OF_NAME: Final = 240  # with what is added to it, all that file systems take

#: What a session of 0.1.0 says if nobody said it.
_DEFAULTS_OF_0_1: Final = (("strength", 5.65), ("plausibility", 0.1))

_MAGIC: Final = b"AMULETKV"
_HEAD: Final = struct.Struct("<8sIIQ")  # magic, version, bytes of the description, bytes of the cache
_CACHE_VERSION: Final = 1


@dataclass
class Session:
    """A conversation as it is saved.

    Attributes:
        messages: with "role" (user, assistant) and "content", in turns.
        settings: of its next answer, the system prompt among them.
        model: path of the model that answered last, or "".
        saved_at: time in UTC, ISO 8601; set by `save`.
    """

    messages: list[dict[str, str]]
    settings: Settings = field(default_factory=Settings)
    model: str = ""
    saved_at: str = ""


def session_path(name: str) -> Path:
    """Return where a session is kept.

    Raises:
        SessionError: the name is none: letters, digits, ".", "-" and "_", at most 100.
    """
    if not _is_name(name):
        raise SessionError(
            f"{shown(name)} is not a name for a session: use up to 100 letters, digits, dots, dashes "
            "and underscores"
        )
    return sessions_folder() / f"{name}.json"


def _is_name(name: str) -> bool:
    is_word = _NAME.fullmatch(name) and not name.endswith((".json", ".kv"))
    return bool(is_word) and len(name.encode()) <= _MAX_BYTES_OF_NAME


def names() -> list[str]:
    """Return the names of all sessions, the newest first.

    Raises:
        SessionError: their folder cannot be read.
    """
    folder = sessions_folder()
    found: dict[str, float] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(".json")
                if name != entry.name and _is_name(name):
                    with contextlib.suppress(OSError):  # removed meanwhile
                        found[name] = entry.stat(follow_symlinks=False).st_mtime
    except FileNotFoundError:
        pass  # nothing was saved yet
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(found, key=found.__getitem__, reverse=True)


def new_name() -> str:
    """Return a name for a conversation that begins now."""
    return datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")[:-3]


def is_new_name(name: str) -> bool:
    """Tell whether nobody chose a name, but `new_name` made it."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}-\d{3}", name, re.ASCII) is not None


def save(name: str, session: Session) -> Path:
    """Write a session, replacing one of the same name as a whole.

    Raises:
        SessionError: the name is none, or the file cannot be written.
    """
    path = session_path(name)
    session.saved_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"format": _FORMAT, "version": VERSION, **dataclasses.asdict(session)}
    try:
        make_folder(path.parent)
        text = json.dumps(record, ensure_ascii=False, indent=1)
        write_atomically(path, text.encode("utf-8", "replace").decode() + "\n")
    except OSError as error:
        raise SessionError(f"the session cannot be saved: {error.strerror or error}: {path}") from None
    return path


def load(name: str) -> Session:
    """Read a session.

    Raises:
        SessionError: there is none of the name, it is damaged, or from a newer version.
    """
    path = session_path(name)
    try:
        record = json.loads(read_file(path, _MAX_BYTES))
    except FileNotFoundError:
        raise SessionError(
            f"there is no session {name!r}: see amulet sessions ls, or /save one in amulet chat"
        ) from None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise SessionError(f"{path} is not a session of amulet")
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise SessionError(
            f"{path} is from a newer amulet (version {version!r}, this one knows {VERSION}): update it"
        )
    try:
        return Session(
            messages=_messages(record["messages"]),
            settings=_settings(record.get("settings", {})),
            model=str(record.get("model", "")),
            saved_at=str(record.get("saved_at", "")),
        )
    except (KeyError, TypeError, ValueError, AmuletError) as error:
        raise SessionError(f"{path} is damaged: {error}") from None


def remove(name: str) -> None:
    """Delete a session.

    Raises:
        SessionError: there is none, or it cannot be deleted.
    """
    path = session_path(name)
    try:
        path.with_suffix(".kv").unlink(missing_ok=True)
        path.unlink()
    except FileNotFoundError:
        raise SessionError(f"there is no session {name!r}: see amulet sessions ls") from None
    except OSError as error:
        raise SessionError(f"{path} cannot be removed: {error.strerror}") from None


def _messages(value: Any) -> list[dict[str, str]]:
    kept = ("role", "content", THOUGHT)
    messages = [{name: each[name] for name in kept if name in each} for each in value]
    for i, message in enumerate(messages):
        if message["role"] != ("user", "assistant")[i % 2] or not all(
            isinstance(each, str) for each in message.values()
        ):
            raise ValueError(f"message {i + 1} is not one of user and assistant in turn")
    if len(messages) % 2:
        raise ValueError("the last message has no answer")
    return messages


def _settings(value: dict[str, Any]) -> Settings:
    told = {name: value[name] for name in SETTINGS if name in value}
    if "adapt" in value:  # 0.1.0 wrote its defaults, too, and they belong to what is gone
        told = {name: told[name] for name in told if (name, told[name]) not in _DEFAULTS_OF_0_1}
    return Settings(**told)


def save_cache(name: str, model: Path, cached: Encoded, data: bytes, cache_type: str = "f16") -> Path:
    """Write the cache of a session beside it.

    Args:
        cache_type: of its numbers; they can be read into a cache of the same alone.

    Raises:
        SessionError: the file cannot be written.
    """
    path = session_path(name).with_suffix(".kv")
    tokens = cached.tokens.astype("<i4").tobytes()
    description = {**_origin(model, cache_type), "n_tokens": len(cached.tokens), "text": cached.text}
    about = json.dumps(description).encode()
    checksum = hashlib.sha256()
    try:
        with replacing(path) as file:
            for part in _parts(about, tokens, data):
                checksum.update(part)
                file.write(part)
            file.write(checksum.digest())
    except OSError as error:
        raise SessionError(f"the cache cannot be saved: {error.strerror or error}: {path}") from None
    return path


def load_cache(name: str, model: Path, cache_type: str = "f16") -> tuple[Encoded, bytes] | None:
    """Return what was saved by `save_cache`; None if there is nothing.

    Raises:
        SessionError: the file is damaged, or not of this model, type and version of llama.cpp.
    """
    import numpy as np
    import psutil

    from amulet_gguf.prompts.template import Encoded

    path = session_path(name).with_suffix(".kv")
    try:
        blob = read_file(path, psutil.virtual_memory().available)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from None
    try:
        magic, version, n_about, n_data = _HEAD.unpack_from(blob)
        if magic != _MAGIC or version != _CACHE_VERSION:
            raise SessionError(f"{path.name} is not a saved cache of this version of amulet")
        content, checksum = memoryview(blob)[:-32], blob[-32:]
        if hashlib.sha256(content).digest() != checksum:
            raise SessionError(f"{path.name} is damaged (checksum)")
        about = {"cache_type": "f16", **json.loads(blob[_HEAD.size : _HEAD.size + n_about])}
        origin = _origin(model, cache_type)
        if {key: about.get(key) for key in origin} != origin:
            raise SessionError(f"{path.name} was saved with another model, cache type or llama.cpp")
        n_tokens = 4 * about["n_tokens"]
        tokens = content[_HEAD.size + n_about : -n_data]
        if len(tokens) != n_tokens or n_data <= 0:
            raise SessionError(f"{path.name} is damaged (lengths)")
        array = np.frombuffer(tokens, "<i4").astype(np.int32)
        return Encoded(str(about["text"]), array), bytes(content[-n_data:])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise SessionError(f"{path.name} is damaged") from None


def _parts(about: bytes, tokens: bytes, data: bytes) -> Iterator[bytes]:
    yield _HEAD.pack(_MAGIC, _CACHE_VERSION, len(about), len(data))
    yield about
    yield tokens
    yield data


def _origin(model: Path, cache_type: str) -> dict[str, Any]:
    """Return what a cache is tied to: the weights, known by size and first megabyte, the type of its
    numbers, and llama.cpp."""
    from importlib import metadata  # takes as long as all of the command line

    with model.open("rb") as file:
        beginning = hashlib.sha256(file.read(2**20)).hexdigest()
    return {
        "model": beginning,
        "model_bytes": model.stat().st_size,
        "cache_type": cache_type,
        "llama_cpp": metadata.version("llama-cpp-python"),
    }
