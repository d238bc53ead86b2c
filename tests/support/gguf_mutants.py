"""GGUF files that are wrong in a place or two, drawn by a seed from well-formed ones."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, Keys

_FORMS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_INTEGERS: Final = (0, 1, 2, 3, 4, 5, 10, 11)
_FLOATS: Final = (6, 12)
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SIZES: Final = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
_LARGEST_TENSOR: Final = 2**21  # bytes that are really written


@dataclass
class Value:
    """A value of the metadata: a number, bytes, or a list of either and the kind of its elements."""

    kind: int
    value: Any
    of: int = -1

    def packed(self) -> bytes:
        if self.kind != _ARRAY:
            return struct.pack("<I", self.kind) + _packed(self.kind, self.value)
        values = b"".join(_packed(self.of, value) for value in self.value)
        return struct.pack("<IIQ", _ARRAY, self.of, len(self.value)) + values


@dataclass
class Tensor:
    """A line of the table of tensors, and its numbers. The first of its shape is the length of a row."""

    name: bytes
    shape: list[int]
    kind: int
    offset: int
    data: bytes = b""

    @property
    def n_bytes(self) -> int:
        block, size = _SIZES.get(self.kind, (1, 4))
        return math.prod(self.shape) // block * size


@dataclass
class File:
    """A GGUF file taken apart; `packed` writes what is in it, right or wrong."""

    metadata: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    version: int = 3
    n_keys: int | None = None  # what the header says instead of the truth
    n_tensors: int | None = None
    alignment: int = 32
    damage: list[Callable[[bytes], bytes]] = field(default_factory=list)  # done to all of it at last

    @property
    def keys(self) -> list[bytes]:
        return [key for key, _ in self.metadata]

    @property
    def architecture(self) -> str:
        values = [value.value for key, value in self.metadata if key == b"general.architecture"]
        return values[0].decode("latin-1") if values and isinstance(values[0], bytes) else "llama"

    def get(self, key: str) -> Value | None:
        return next((value for name, value in self.metadata if name == key.encode()), None)

    def remove(self, key: bytes) -> None:
        self.metadata = [(name, value) for name, value in self.metadata if name != key]

    def set(self, key: bytes, value: Value) -> None:
        if key in self.keys:
            self.metadata[self.keys.index(key)] = (key, value)
        else:
            self.metadata.append((key, value))

    def lay_out(self) -> None:
        """Make offsets and data what the shapes and types say."""
        offset = 0
        for tensor in self.tensors:
            size = min(tensor.n_bytes, _LARGEST_TENSOR)
            tensor.data = (tensor.data * (size // max(1, len(tensor.data)) + 1))[:size]
            tensor.offset = offset
            offset += len(self._padded(tensor.data))

    def packed(self) -> bytes:
        n_keys = len(self.metadata) if self.n_keys is None else self.n_keys
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        head = [b"GGUF", struct.pack("<IQQ", self.version, n_tensors, n_keys)]
        for key, value in self.metadata:
            head += [_packed(_STRING, key), value.packed()]
        for tensor in self.tensors:
            head.append(_packed(_STRING, tensor.name))
            head.append(struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape))
            head.append(struct.pack("<IQ", tensor.kind, tensor.offset))
        data = self._padded(b"".join(head)) + b"".join(self._padded(each.data) for each in self.tensors)
        for damage in self.damage:
            data = damage(data)
        return data

    def _padded(self, data: bytes) -> bytes:
        return data + b"\0" * (-len(data) % self.alignment)


def _packed(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return struct.pack("<Q", len(value)) + bytes(value)
    return struct.pack("<" + _FORMS[kind], value)


def parse(data: bytes) -> File:
    """Take a well-formed file apart."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at]

    def one(kind: int) -> Any:
        return text() if kind == _STRING else take(_FORMS[kind])

    version, n_tensors, n_keys = take("I"), take("Q"), take("Q")
    metadata = []
    for _ in range(n_keys):
        key, kind = text(), take("I")
        if kind == _ARRAY:
            of, n = take("I"), take("Q")
            metadata.append((key, Value(kind, [one(of) for _ in range(n)], of)))
        else:
            metadata.append((key, Value(kind, one(kind))))
    tensors = []
    for _ in range(n_tensors):
        name = text()
        shape = [take("Q") for _ in range(take("I"))]
        tensors.append(Tensor(name, shape, take("I"), take("Q")))
    begin = at + -at % 32
    for tensor in tensors:
        tensor.data = data[begin + tensor.offset : begin + tensor.offset + tensor.n_bytes]
    return File(metadata, tensors, version)


# Metadata

#: Keys that llama.cpp may look for, whether a file has them or not.
_KNOWN: Final = [
    key
    for group in (Keys.General, Keys.LLM, Keys.Attention, Keys.Rope, Keys.SSM, Keys.ShortConv,
                  Keys.Split, Keys.Tokenizer, Keys.Classifier)
    for key in vars(group).values()
    if isinstance(key, str) and "." in key and "source" not in key
]  # fmt: skip
_NUMBERS: Final = (
    0, 1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 63, 65, 127, 255, 256, 511, 512, 513, 4096, 65537, 2**20 + 1,
    2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
_FRACTIONS: Final = (
    0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 1e-45, 1e-30, 1e6, 3e38, -3e38, 1e300,
)  # fmt: skip
_TEXTS: Final = (
    b"", b" ", b"\0", b"none", b"linear", b"yarn", b"longrope", b"llama", b"gpt2", b"bert", b"t5",
    b"rwkv", b"no_vocab", b"gemma4", b"plamo2", b"default", b"qwen2", b"mamba", b"gemma3", b"clip",
    b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"a\0b", b"\x1b]0;title\x07", b"two\nlines", b"x" * 70_000,
    "é🙂\u202e".encode(), b"%s%n%d", b"{{ 1 }}", b"[EMPTY_1]",
)  # fmt: skip
_TOKENIZERS: Final = (b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"gemma4", b"no_vocab",
                      b"none", b"hybriddna", b"whitespace", b"test", b"nobody", b"")  # fmt: skip
_ARCHITECTURES: Final = (
    b"qwen2", b"llama", b"gemma2", b"gemma3", b"qwen3", b"mamba", b"mamba2", b"phi3", b"lfm2", b"bert",
    b"t5", b"falcon", b"rwkv6", b"jamba", b"qwen2moe", b"mpt", b"olmo2", b"granite", b"clip",
    b"starcoder2", b"deepseek2",
)  # fmt: skip
#: Parts of keys that tell of what kind their values are; others are whole numbers.
_LIKELY: Final = (
    ((b"eps", b"base", b"scale", b"factor", b"soft", b"alibi", b"clamp"), _F32),
    ((b".type", b".model", b".pre", b".name"), _STRING),
    ((b"add_", b"causal", b"dt_b_c_rms", b"finetuned", b"norm", b"remove"), _BOOL),
)  # fmt: skip


def _scalar(random: Random, kind: int) -> Value:
    if kind == _STRING:
        return Value(kind, random.choice(_TEXTS))
    if kind == _BOOL:
        return Value(kind, random.random() < 0.5)
    if kind in _FLOATS:
        return Value(kind, random.choice(_FRACTIONS[: -1 if kind == _F32 else None]))
    bits = 8 * struct.calcsize(_FORMS[kind])
    number = random.choice(_NUMBERS) % 2**bits
    signed = _FORMS[kind].islower() and number >= 2 ** (bits - 1)
    return Value(kind, number - 2**bits if signed else number)


def _known_key(file: File, random: Random) -> bytes:
    return random.choice(_KNOWN).replace("{arch}", file.architecture).encode("latin-1")


def _key_removed(file: File, random: Random) -> str:
    key = random.choice(file.keys)
    file.remove(key)
    return f"{_name(key)} removed"


def _key_set(file: File, random: Random) -> str:
    """A value of the kind that is read, if the file has one; otherwise likely that kind."""
    key = random.choice(file.keys) if random.random() < 0.6 else _known_key(file, random)
    old = dict(file.metadata).get(key)
    if old is None or old.kind == _ARRAY:
        kind = next((kind for words, kind in _LIKELY if any(word in key for word in words)), _U32)
    else:
        kind = old.kind
    value = _scalar(random, kind)
    file.set(key, value)
    return f"{_name(key)} = {str(value.value)[:40]}"


def _key_of_other_kind(file: File, random: Random) -> str:
    key = random.choice([*file.keys, _known_key(file, random)])
    value = _scalar(random, random.choice([*_FORMS, _STRING]))
    file.set(key, value)
    return f"{_name(key)} = {str(value.value)[:40]} of kind {value.kind}"


def _key_as_array(file: File, random: Random) -> str:
    key = random.choice([*file.keys, _known_key(file, random)])
    old = dict(file.metadata).get(key)
    kind = old.kind if old and old.kind != _ARRAY else random.choice([*_FORMS, _STRING])
    n = random.choice((0, 0, 1, 2, 3, 4, 5, 600))
    file.set(key, Value(_ARRAY, [_scalar(random, kind).value for _ in range(n)], kind))
    return f"{_name(key)} = {n} values of kind {kind}"


def _key_per_layer(file: File, random: Random) -> str:
    key = _known_key(file, random)
    count = file.get(f"{file.architecture}.block_count")
    n = count.value if count and count.kind in _INTEGERS and 0 <= count.value < 100 else 2
    old = dict(file.metadata).get(key)
    if old is not None and old.kind in _INTEGERS and random.random() < 0.5:  # one of them wrong
        kind, values = old.kind, [old.value] * n
        for place in random.sample(range(n), min(n, 1)):
            values[place] = _scalar(random, kind).value
    else:
        kind = random.choice((_U32, _I32, _BOOL, _F32))
        values = [_scalar(random, kind).value for _ in range(n)]
    file.set(key, Value(_ARRAY, values, kind))
    return f"{_name(key)} = {str(values)[:60]}"


def _key_doubled(file: File, random: Random) -> str:
    key, value = random.choice(file.metadata)
    file.metadata.append((key, value))
    return f"{_name(key)} twice"


def _architecture(file: File, random: Random) -> str:
    name = random.choice(_ARCHITECTURES)
    old = file.architecture.encode("latin-1") + b"."
    file.set(b"general.architecture", Value(_STRING, name))
    if random.random() < 0.8:  # its keys too: what is missing then is the architecture's own
        file.metadata = [
            (name + b"." + key[len(old) :] if key.startswith(old) else key, value)
            for key, value in file.metadata
        ]
    return f"the architecture {_name(name)}"


# Vocabulary


_COLUMNS: Final = {"tokens": _STRING, "merges": _STRING, "scores": _F32, "token_type": _I32}


def _column(file: File, name: str) -> list[Any] | None:
    value = file.get(f"tokenizer.ggml.{name}")
    is_one = value is not None and value.of == _COLUMNS[name] and value.value
    return value.value if value is not None and is_one else None


def _tokens(file: File, random: Random) -> str:
    tokens = _column(file, "tokens")
    if tokens is None:
        return ""
    places = [random.randrange(len(tokens)) for _ in range(random.choice((1, 1, 2, 20, 500)))]
    text = random.choice((*_TEXTS, tokens[0], tokens[-1], b"<0x41>", b"<0x", b"<", b"<|im_end|>", b"\n"))
    for place in places:
        tokens[place] = text
    return f"{len(places)} tokens {str(text)[:40]}"


def _fewer_tokens(file: File, random: Random) -> str:
    tokens = _column(file, "tokens")
    if tokens is None:
        return ""
    n = random.choice((0, 1, 2, 3, 100, len(tokens) - 1))
    columns = random.sample(("tokens", "token_type", "scores"), random.choice((1, 3)))
    for name in columns:
        column = _column(file, name)
        if column is not None:
            del column[n:]
    return f"{n} in the columns {columns}"


def _token_types(file: File, random: Random) -> str:
    types = _column(file, "token_type")
    if types is None:
        return ""
    kind = random.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 2**31 - 1))
    places = [random.randrange(len(types)) for _ in range(random.choice((1, 3, 30, 3000)))]
    for place in places:
        types[place] = kind
    return f"{len(places)} tokens of type {kind}"


def _scores(file: File, random: Random) -> str:
    scores = _column(file, "scores")
    if scores is None:
        return ""
    score = random.choice((math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0))
    for _ in range(random.choice((1, 10, 3000))):
        scores[random.randrange(len(scores))] = score
    return f"scores of {score}"


def _merges(file: File, random: Random) -> str:
    merges = _column(file, "merges")
    if merges is None:
        return ""
    text = random.choice((*_TEXTS, b"a", b" a", b"a ", b"a b c", "\u0120 \u0120".encode()))
    for _ in range(random.choice((1, 10, 1000))):
        merges[random.randrange(len(merges))] = text
    return f"merges {str(text)[:40]}"


def _special_ids(file: File, random: Random) -> str:
    roles = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_pad")
    chosen = random.sample(roles, random.choice((1, 2, 4)))
    tokens = _column(file, "tokens") or []
    number = random.choice(
        (0, len(tokens) - 1, len(tokens), len(tokens) + 1, 2**31 - 1, 2**31, 2**32 - 1)
    )
    for role in chosen:
        file.set(f"tokenizer.ggml.{role}_token_id".encode(), Value(_U32, number % 2**32))
    return f"{', '.join(chosen)} = {number}"


def _tokenizer(file: File, random: Random) -> str:
    name = random.choice(_TOKENIZERS)
    file.set(b"tokenizer.ggml.model", Value(_STRING, name))
    if random.random() < 0.3:
        file.remove(b"tokenizer.ggml.pre")
    return f"tokenizer {_name(name)}"


# Tensors


def _tensor(file: File, random: Random) -> Tensor:
    return random.choice(file.tensors)


def _tensors_removed(file: File, random: Random) -> str:
    name = _tensor(file, random).name
    end, layer = name.split(b".", 2)[-1], name[: name.find(b".", 4) + 1]
    gone = random.choice(
        (lambda other: other == name, lambda other: other.endswith(end), lambda other: layer in other)
    )
    file.tensors = [each for each in file.tensors if not gone(each.name)]
    return f"without {_name(name)} and its like"


def _tensor_renamed(file: File, random: Random) -> str:
    tensor = _tensor(file, random)
    old = _name(tensor.name)
    tensor.name = random.choice(
        (b"", b"x", b"x" * 63, b"x" * 64, b"x" * 5000, b"blk.0.", b"blk.-1.attn_q.weight", b"\xff\0",
         b"a\nb", b"blk.99999999999.attn_q.weight", b"blk.7.attn_q.weight", tensor.name + b"\0",
         b"output.bias", tensor.name.replace(b"weight", b"bias"), tensor.name.replace(b"0", b"1"),
         b"rope_freqs.weight", _tensor(file, random).name)
    )  # fmt: skip
    return f"{old} is called {_name(tensor.name)[:40]}"


def _tensor_doubled(file: File, random: Random) -> str:
    tensor = copy.copy(_tensor(file, random))
    file.tensors.insert(random.randrange(len(file.tensors) + 1), tensor)
    return f"{_name(tensor.name)} twice"


def _tensors_of_other_type(file: File, random: Random) -> str:
    """A type of another size, too: `lay_out` makes the rest fit, so that llama.cpp reads on."""
    name = _tensor(file, random).name
    kind = random.choice([*_SIZES, *_SIZES, 24, 25, 26, 27, 28, 4, 5, 31, 42, 99, 2**31, 2**32 - 1])
    all_alike = random.random() < 0.3
    end = name.split(b".", 2)[-1] if name.startswith(b"blk.") else name
    for tensor in file.tensors:
        if tensor.name == name or (all_alike and tensor.name.endswith(end)):
            tensor.kind = kind
    return f"{_name(name)} of type {kind}{' in all layers' if all_alike else ''}"


def _tensor_of_other_shape(file: File, random: Random) -> str:
    tensor = _tensor(file, random)
    old = list(tensor.shape)
    change = random.randrange(4)
    if change == 0:
        tensor.shape.reverse()
    elif change == 1:
        numbers = [number for number in _NUMBERS if number >= 0]
        tensor.shape[random.randrange(len(tensor.shape))] = random.choice(numbers)
    elif change == 2:
        tensor.shape = [*tensor.shape, random.choice((0, 1, 2, 2**40))][:: random.choice((1, -1))]
    else:
        tensor.shape = random.choice(([], [1] * 4, [1] * 9, [0], tensor.shape[:1], [64, 64]))
    return f"{_name(tensor.name)} of {tensor.shape} instead of {old}"


def _offset(file: File, random: Random) -> str:
    tensor = _tensor(file, random)
    tensor.offset = random.choice(
        (0, 1, tensor.offset + 1, tensor.offset + 32, max(0, tensor.offset - 32), 2**40, 2**63,
         2**64 - 1, 2**64 - 32, _tensor(file, random).offset)
    )  # fmt: skip
    return f"{_name(tensor.name)} at {tensor.offset}"


def _numbers(file: File, random: Random) -> str:
    tensor = _tensor(file, random)
    pattern = random.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff" * 4, b"\0" * 4, b"\xff\xff\x7f\x7f")
    )
    tensor.data = pattern * (len(tensor.data) // 4)
    return f"all of {_name(tensor.name)} {pattern.hex()}"


# The file


def _alignment(file: File, random: Random) -> str:
    value = random.choice((0, 1, 2, 3, 7, 8, 16, 24, 64, 4096, 2**20, 2**31, 2**32 - 1))
    file.set(b"general.alignment", Value(_U32, value))
    if 0 < value <= 4096 and random.random() < 0.7:  # and laid out so
        file.alignment = value
    return f"alignment {value}"


def _header(file: File, random: Random) -> str:
    number = random.choice((0, 1, 2, 4, 1000, 2**20, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))
    what = random.choice(("version", "n_keys", "n_tensors"))
    setattr(file, what, number % 2**32 if what == "version" else number)
    return f"{what} {number}"


def _cut(file: File, random: Random) -> str:
    where = random.random() ** random.choice((1, 4))
    file.damage.append(lambda data: data[: int(len(data) * where)])
    return f"cut at {where:.4f}"


def _flipped(file: File, random: Random) -> str:
    seed, n = random.randrange(2**32), random.choice((1, 1, 2, 8, 64))

    def flip(data: bytes) -> bytes:
        draw, changed = Random(seed), bytearray(data)
        # What is before the numbers of the tensors is some 30,000 bytes.
        for _ in range(n if data else 0):
            at = draw.randrange(min(len(changed), draw.choice((24, 2000, 30_000, 2**30))))
            changed[at] = draw.randrange(256)
        return bytes(changed)

    file.damage.append(flip)
    return f"{n} bytes changed"


def _name(key: bytes) -> str:
    return key.decode("latin-1")[:60]


_MUTATIONS: Final[tuple[tuple[int, Callable[[File, Random], str]], ...]] = (
    (10, _key_removed), (30, _key_set), (8, _key_of_other_kind), (6, _key_as_array),
    (10, _key_per_layer), (1, _key_doubled), (5, _architecture), (6, _tokens), (3, _fewer_tokens),
    (4, _token_types), (2, _scores), (2, _merges), (4, _special_ids), (3, _tokenizer),
    (4, _tensors_removed), (3, _tensor_renamed), (1, _tensor_doubled), (8, _tensors_of_other_type),
    (6, _tensor_of_other_shape), (2, _offset), (3, _numbers), (2, _alignment), (2, _header), (2, _cut),
    (5, _flipped),
)  # fmt: skip


def mutant(file: File, random: Random) -> tuple[str, bytes]:
    """Return how a file differs from a well-formed one, and its bytes."""
    file = copy.deepcopy(file)
    weights, mutations = zip(*_MUTATIONS, strict=True)
    drawn = random.choices(mutations, weights, k=random.choice((1, 1, 1, 2, 3)))
    said = [mutate(file, random) for mutate in drawn if file.metadata and file.tensors]
    if random.random() < 0.85 and not {_offset, _alignment} & set(drawn):
        file.lay_out()
    return "; ".join(filter(None, said)), file.packed()
