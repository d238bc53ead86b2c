"""What a GGUF file says about itself, read without its weights and without llama.cpp."""

from __future__ import annotations

import dataclasses
import functools
import glob
import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from amulet_gguf.errors import ModelFormatError, ModelNotFoundError
from amulet_gguf.llama.files import open_file

_MAGIC: Final = b"GGUF"
_MAX_KEYS: Final = 4096
_MAX_TENSORS: Final = 65536
_MAX_NUMBERS: Final = 4096  # of an array that is kept: per-layer numbers
_MAX_TEXT: Final = 2**24  # bytes of one text; real templates have some thousand
_MAX_TEXTS: Final = 2**22  # in arrays; the largest vocabularies and their merges have a million
_SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9

#: Names of `general.file_type`, llama.cpp's `llama_ftype`.
FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M",
    18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S",
    25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M",
    32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
#: The key of the vocabulary.
TOKENS: Final = "tokenizer.ggml.tokens"
#: What ends the name of a file that is part of a model: its number, and how many there are.
SPLIT: Final = re.compile(r"-([0-9]{5})-of-([0-9]{5})\Z")
_GUESSED: Final = 1024  # a bit that is set where llama.cpp guessed the type
_IN_NAME: Final = re.compile(
    r"(?<![A-Z0-9])(I?Q\d_[A-Z0-9]+(_[A-Z0-9]+)?|TQ[12]_0|MXFP4|NVFP4|BF16|F16|F32)(?![A-Z0-9])"
)


class Tensor(NamedTuple):
    """A line of the table of tensors.

    Attributes:
        shape: the length of a row first.
        kind: its type, ggml's `ggml_type`.
    """

    shape: tuple[int, ...]
    kind: int


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        metadata: its keys, but for long arrays, of which only the length is kept (as an int under
            "KEY.length").
        tensors: by name; none if only the beginning was read.
        n_bytes: up to the end of the table of tensors; 0 likewise.
        tokens_at: where the spellings of the vocabulary begin; 0 where there are none.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    n_bytes: int = 0
    tokens_at: int = 0

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors; 0 if only the beginning was read."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        return self.text("general.architecture") or "unknown"

    @property
    def quantization(self) -> str:
        kind = self.metadata.get("general.file_type")
        return FILE_TYPES.get(kind & ~_GUESSED, "?") if isinstance(kind, int) else "?"

    @property
    def n_ctx_train(self) -> int:
        return self.number("context_length")

    @property
    def n_vocab(self) -> int:
        length = self.metadata.get(f"{TOKENS}.length")
        return self.number("vocab_size") or (length if isinstance(length, int) else 0)

    @property
    def n_parts(self) -> int:
        """Files that the model is split into."""
        parts = self.metadata.get("split.count", 1)
        return parts if isinstance(parts, int) and parts > 0 else 1

    def text(self, key: str) -> str:
        """Return a text, "" where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number of the architecture's own keys."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def per_layer(self, key: str, default: int) -> list[int]:
        """Return a number for each layer, whether the file gives one or one for each."""
        n_layers = max(0, min(self.number("block_count"), _MAX_NUMBERS))
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            numbers = [each if isinstance(each, int) else default for each in value[:n_layers]]
            return numbers + [default] * (n_layers - len(numbers))
        return [value if isinstance(value, int) else default] * n_layers


def read_header(path: Path, *, brief: bool = False) -> Header:
    """Read the header of a GGUF file.

    Args:
        brief: stop before the vocabulary, which most files have behind what a list of models shows.

    Raises:
        ModelNotFoundError: there is no such file, or it cannot be read.
        ModelFormatError: it is not a GGUF file, or a damaged one.
    """
    check_magic(path)
    try:
        stat = path.stat()
        return _read(path, brief, stat.st_mtime_ns, stat.st_size, stat.st_ino)
    except OSError as error:
        raise ModelNotFoundError(f"{shown(path)} cannot be read: {error.strerror or error}") from None


@functools.lru_cache(maxsize=4)  # loading a model asks three times, and a large vocabulary takes 40 ms
def _read(path: Path, brief: bool, *_identity: int) -> Header:
    with _mapped(path) as data:
        return _Reader(data).header(brief)


def read_tokens(path: Path, header: Header) -> list[bytes]:
    """Return the spellings of the vocabulary, as the file has them; errors as `read_header`."""
    unpack, at, tokens = struct.Struct("<Q").unpack_from, header.tokens_at, list[bytes]()
    with _mapped(path) as data:
        for _ in range(header.metadata[f"{TOKENS}.length"] if at else 0):
            begin = at + 8
            at = begin + unpack(data, at)[0]
            tokens.append(data[begin:at])
    return tokens


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    try:
        with open_file(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise ModelNotFoundError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ModelFormatError(
            f"{shown(path)} is damaged or incomplete ({error}): download it again"
        ) from None


def read_model(path: Path) -> Header:
    """Return the header of a model's first file, with the tensors of all its files; errors as above."""
    first = read_header(path)
    tensors = dict(first.tensors)
    for part in parts(path)[1:]:
        tensors |= read_header(part).tensors
    return dataclasses.replace(first, tensors=tensors)


def parts(path: Path) -> list[Path]:
    """Return all files of a model, of which `path` is the only or the first one."""
    match = SPLIT.search(path.stem)
    if match is None or int(match[1]) != 1:
        return [path]
    base, digit = glob.escape(path.stem[: match.start()]), "[0-9]"
    return sorted(path.parent.glob(f"{base}-{digit * 5}-of-{match[2]}.gguf"))


def size(path: Path) -> int:
    """Return the bytes of all files of a model; raises OSError where one cannot be looked at."""
    return sum(part.stat().st_size for part in parts(path))


def quantization_in(name: str) -> str:
    """Return the quantization that a file's name tells, "?" if it tells none.

    What llama.cpp quantizes now has `general.file_type` behind the vocabulary, where `brief` ends.
    """
    match = _IN_NAME.search(name.upper())
    return match[1] if match else "?"


def shown(path: Path) -> str:
    """Return a path that can be printed: what is no text in it is escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def check_magic(path: Path) -> None:
    """Refuse what is certainly not a GGUF file; errors as `read_header`."""
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise ModelNotFoundError(f"there is no model file at {shown(path)}: check the path") from None
    except OSError as error:
        raise ModelNotFoundError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
    if magic != _MAGIC:
        raise ModelFormatError(f"{shown(path)} is not a GGUF file: choose a model in GGUF format")


class _Reader:
    """Walks over a header. Every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        self._n_texts = 0
        self._tokens_at = 0

    def header(self, brief: bool) -> Header:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        if n_keys > _MAX_KEYS or n_tensors > _MAX_TENSORS:
            raise ValueError(f"{n_keys} keys and {n_tensors} tensors")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text()
            kind = self._scalar("I")
            if kind == _ARRAY:
                if brief and key.startswith("tokenizer.") and "general.architecture" in metadata:
                    break
                self._array(key, metadata)
            else:
                metadata[key] = self._text() if kind == _STRING else self._number(kind)
        if brief:
            return Header(metadata, {})
        tensors: dict[str, Tensor] = {}
        for _ in range(n_tensors):
            name, n_dimensions = self._text(), self._scalar("I")
            if n_dimensions > 8:
                raise ValueError(f"a tensor of {n_dimensions} dimensions")
            *shape, kind, _offset = self._scalars(f"{n_dimensions}QIQ")
            tensors[name] = Tensor(tuple(shape), kind)
        return Header(metadata, tensors, self._at, self._tokens_at)

    def _scalars(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def _scalar(self, form: str) -> Any:
        return self._scalars(form)[0]

    def _number(self, kind: int) -> Any:
        if kind not in _SCALARS:
            raise ValueError(f"a value of kind {kind}")
        return self._scalar(_SCALARS[kind])

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > len(self._data) - self._at:
            raise ValueError(f"{n_bytes} bytes at {self._at}")
        self._at += n_bytes

    def _text(self) -> str:
        size = self._scalar("Q")
        if size > _MAX_TEXT:
            raise ValueError(f"a text of {size} bytes")
        begin = self._at
        self._skip(size)
        return self._data[begin : self._at].decode("utf-8", "replace")

    def _array(self, key: str, metadata: dict[str, Any]) -> None:
        kind, length = self._scalar("I"), self._scalar("Q")
        metadata[f"{key}.length"] = length
        if kind == _STRING:
            unpack, data, at, end = (
                struct.Struct("<Q").unpack_from,
                self._data,
                self._at,
                len(self._data),
            )
            if key == TOKENS:
                self._tokens_at = at
            self._n_texts += length
            if self._n_texts > _MAX_TEXTS:
                raise ValueError(f"{self._n_texts} texts")
            for _ in range(length):
                at += 8 + unpack(data, at)[0]
                if at > end:
                    raise ValueError(f"a text that ends at {at}")
            self._at = at
        elif kind in _SCALARS:
            begin, size = self._at, struct.calcsize(_SCALARS[kind])
            self._skip(length * size)
            if length <= _MAX_NUMBERS:
                values = struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._data, begin)
                metadata[key] = list(values)
        else:
            raise ValueError(f"an array of kind {kind}")
