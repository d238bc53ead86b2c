"""What would end the process inside llama.cpp is refused from a file's header; nothing real is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixture_types import Tiny
from gguf_mutants import File, Tensor, Value, parse
from peer_models import peer_models
from tiny_models import ARCHITECTURES

from amulet_gguf.amulet import load_model
from amulet_gguf.errors import ModelFormatError
from amulet_gguf.llama.checks import check
from amulet_gguf.llama.gguf import read_header
from amulet_gguf.llama.loading import Loading
from amulet_gguf.llama.model import Model

U32, I32, F32, TEXT, ARRAY = 4, 5, 6, 8, 9
Change = Callable[[File], Any]


def number(key: str, value: int) -> Change:
    return lambda file: file.set(key.encode(), Value(U32, value))


def numbers(key: str, *values: int) -> Change:
    return lambda file: file.set(key.encode(), Value(ARRAY, list(values), U32))


def fraction(key: str, value: float) -> Change:
    return lambda file: file.set(key.encode(), Value(F32, value))


def text(key: str, value: bytes) -> Change:
    return lambda file: file.set(key.encode(), Value(TEXT, value))


def token(place: int, spelling: bytes) -> Change:
    def change(file: File) -> None:
        value = file.get("tokenizer.ggml.tokens")
        assert value is not None
        value.value[place] = spelling

    return change


def kind(end: str, value: int) -> Change:
    def change(file: File) -> None:
        for tensor in file.tensors:
            if tensor.name.decode().endswith(end):
                tensor.kind = value
        file.lay_out()

    return change


@pytest.mark.parametrize(
    ("architecture", "change", "said"),
    [
        ("llama", number("llama.block_count", 0), "it has 0 layers"),
        ("llama", number("llama.block_count", 513), "it has 513 layers"),
        ("llama", number("llama.nextn_predict_layers", 3), "3 of 2 layers"),
        ("llama", number("llama.expert_count", 8), "0 of 8 experts"),
        ("llama", number("llama.expert_used_count", 2), "2 of 0 experts"),
        ("llama", numbers("llama.expert_used_count", 0, 1), "1 of 0 experts"),
        ("llama", number("llama.expert_group_count", 4), "0 experts are in 4 groups"),
        ("llama", number("llama.attention.head_count", 0), "its attention has no heads"),
        ("lfm2", numbers("lfm2.attention.head_count", 2**20, 2), "1048576 heads of attention for 64"),
        ("lfm2", numbers("lfm2.attention.head_count", 2, 0), "layer 1 has no heads"),
        ("lfm2", number("lfm2.attention.head_count", 1), "layer 1 has 1 and 1 heads"),
        ("qwen3", numbers("qwen3.attention.head_count_kv", 1, 8), "layer 1 has 2 and 8 heads"),
        ("qwen3", number("qwen3.rope.dimension_count", 16), "16 of heads of 32"),
        ("gemma3", number("gemma3.rope.dimension_count", 0), "0 of heads of 32"),
        ("lfm2", number("lfm2.rope.dimension_count", 31), "31 of heads of 32"),
        ("gemma3", number("gemma3.rope.dimension_count_swa", 64), "_swa is 64 of heads of 32"),
        ("lfm2", number("lfm2.attention.sliding_window", 2**31 - 1), "sliding_window is 2147483647"),
        ("gemma3", number("gemma3.attention.sliding_window_pattern", 1), "no layer looks through"),
        ("llama", text("llama.rope.scaling.type", b"\x1b[1m"), r"rope.scaling.type is '\\x1b\[1m'"),
        ("llama", fraction("llama.attention.layer_norm_rms_epsilon", -1.0), "epsilon is -1.0"),
        ("llama", fraction("llama.attention.layer_norm_rms_epsilon", math.nan), "epsilon is nan"),
        ("llama", number("general.alignment", 8), "general.alignment is 8"),
        ("llama", kind("attn_v.weight", 26), "attn_v.weight' is of type I32"),
        ("llama", kind("attn_norm.weight", 1), "attn_norm.weight' is not of type F32"),
        ("lfm2", kind("shortconv.conv.weight", 1), "conv.weight' is not of type F32"),
        ("llama", token(300, b"<s>"), "1 of its 597 tokens are spelled like others"),
        ("llama", token(300, b"<s>\0x"), "1 of its 597 tokens are spelled like others"),
        ("llama", token(7, b"seven"), "no token for the byte 4"),
        ("llama", text("tokenizer.ggml.model", b"bert"), "none of the tokenizer bert"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, tiny: Tiny, architecture: str, change: Change, said: str
) -> None:
    file = parse(tiny(architecture).read_bytes())
    change(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.packed())
    with pytest.raises(ModelFormatError, match=said) as caught:
        check(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "bert"])
def test_what_is_well_formed_passes(tmp_path: Path, tiny: Tiny, name: str) -> None:
    check(tiny(name))
    path = tmp_path / "again.gguf"
    path.write_bytes(parse(tiny(name).read_bytes()).packed())
    assert path.read_bytes() == tiny(name).read_bytes()


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem[11:]) for path in sorted(peer_models().glob("*.gguf"))]
)
def test_the_vocabularies_and_numbers_of_real_models_pass(path: Path) -> None:
    check(path)
    assert read_header(path).n_vocab > 30_000


#: What published files say: numbers by key, and rows of the queries and keys of a layer.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "qwen3next": (
        {"block_count": 48, "embedding_length": 2048, "attention.head_count": 16, "expert_count": 512,
         "attention.head_count_kv": 2, "attention.key_length": 256, "rope.dimension_count": 64,
         "expert_used_count": 10, "full_attention_interval": 4},
        {"blk.3.attn_q": 8192, "blk.3.attn_k": 512},
    ),
    "gpt-oss": (
        {"block_count": 24, "embedding_length": 2880, "attention.head_count": 64, "expert_count": 32,
         "attention.head_count_kv": 8, "attention.key_length": 64, "attention.sliding_window": 128,
         "expert_used_count": 4, "rope.scaling.type": "yarn"},
        {"blk.0.attn_q": 4096, "blk.0.attn_k": 512},
    ),
    "gemma3": (
        {"block_count": 34, "embedding_length": 2560, "attention.head_count": 8,
         "attention.head_count_kv": 4, "attention.key_length": 256, "attention.sliding_window": 1024,
         "rope.scaling.type": "linear"},
        {"blk.0.attn_q": 2048, "blk.0.attn_k": 1024},
    ),
    "gemma3n": (
        {"block_count": 30, "embedding_length": 2048, "attention.head_count": 8,
         "attention.head_count_kv": 2, "attention.key_length": 256, "attention.sliding_window": 512,
         "attention.sliding_window_pattern": [1, 1, 1, 1, 0] * 6, "attention.shared_kv_layers": 10},
        {"blk.0.attn_q": 2048, "blk.0.attn_k": 512},
    ),
    "deepseek2": (
        {"block_count": 61, "embedding_length": 7168, "attention.head_count": 128, "expert_count": 256,
         "attention.head_count_kv": 1, "attention.key_length": 576, "rope.dimension_count": 64,
         "expert_used_count": 8, "expert_group_count": 8, "expert_group_used_count": 4,
         "rope.scaling.type": "yarn"},
        {"blk.0.attn_q_a": 1536, "blk.0.attn_kv_a_mqa": 576},
    ),
    "granitehybrid": (
        {"block_count": 10, "embedding_length": 1536, "attention.head_count": 12, "expert_count": 64,
         "attention.head_count_kv": [0, 0, 0, 0, 0, 4, 0, 0, 0, 0], "rope.dimension_count": 128,
         "expert_used_count": 6},
        {"blk.5.attn_q": 1536, "blk.5.attn_k": 512},
    ),
    "nemotron_h": (
        {"block_count": 4, "embedding_length": 4480, "attention.head_count": 40,
         "attention.head_count_kv": [0, 0, 8, 0], "attention.key_length": 128},
        {"blk.2.attn_q": 5120, "blk.2.attn_k": 1024},
    ),
    "lfm2moe": (
        {"block_count": 3, "embedding_length": 2048, "attention.head_count": 32, "expert_count": 32,
         "attention.head_count_kv": [0, 0, 8], "expert_used_count": 4},
        {"blk.2.attn_q": 2048, "blk.2.attn_k": 512},
    ),
    "glm4moe": (
        {"block_count": 47, "embedding_length": 4096, "attention.head_count": 96, "expert_count": 128,
         "attention.head_count_kv": 8, "attention.key_length": 128, "rope.dimension_count": 64,
         "expert_used_count": 8, "expert_group_count": 1, "expert_group_used_count": 1,
         "nextn_predict_layers": 1},
        {"blk.46.attn_q": 12288, "blk.46.attn_k": 1024},
    ),
    "kimi-linear": (
        {"block_count": 4, "embedding_length": 2304, "attention.head_count": 32, "expert_count": 256,
         "attention.head_count_kv": [0, 0, 0, 1], "attention.key_length": 576, "expert_used_count": 8,
         "rope.dimension_count": 64},
        {"blk.0.attn_q": 4096, "blk.0.attn_k": 4096, "blk.0.ssm_a": 32, "blk.3.attn_q": 6144},
    ),
    "glm5-next": (
        {"block_count": 2, "embedding_length": 2048, "attention.head_count": [0, 16], "expert_count": 64,
         "attention.head_count_kv": [0, 1], "rope.dimension_count": 0, "expert_used_count": 8},
        {"blk.0.attn_q": 2048, "blk.0.attn_k": 2048, "blk.0.ssm_a": 16},
    ),
    "deci": (
        {"block_count": 2, "embedding_length": 8192, "attention.head_count": [64, 0],
         "attention.head_count_kv": [8, 0], "rope.dimension_count": 128},
        {"blk.0.attn_q": 8192, "blk.0.attn_k": 1024},
    ),
    "mimo2": (
        {"block_count": 2, "embedding_length": 4096, "attention.head_count": 64, "expert_count": 256,
         "attention.head_count_kv": [4, 8], "attention.key_length": 192, "rope.dimension_count": 64,
         "expert_used_count": 8},
        {"blk.0.attn_q": 12288, "blk.0.attn_k": 768, "blk.1.attn_q": 12288, "blk.1.attn_k": 1536},
    ),
    "phi2": (
        {"block_count": 32, "embedding_length": 2560, "attention.head_count": 32,
         "rope.dimension_count": 32},
        {"blk.0.attn_qkv": 7680},
    ),
    "bert": (
        {"block_count": 12, "embedding_length": 384, "attention.head_count": 12},
        {"blk.0.attn_q": 384, "blk.0.attn_k": 384},
    ),
    "hunyuan-dense": (
        {"block_count": 32, "embedding_length": 4096, "attention.head_count": 32, "expert_count": 1,
         "attention.head_count_kv": 8, "expert_used_count": 1},
        {"blk.0.attn_q": 4096, "blk.0.attn_k": 1024},
    ),
    "mamba2": ({"block_count": 64, "embedding_length": 2560, "attention.head_count": 0}, {}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_the_numbers_of_published_models_pass(tmp_path: Path, architecture: str) -> None:
    keys, rows = PUBLISHED[architecture]
    file = File([(b"general.architecture", Value(TEXT, architecture.encode()))], [])
    for key, value in keys.items():
        name = f"{architecture}.{key}"
        if isinstance(value, str):
            text(name, value.encode())(file)
        elif isinstance(value, list):
            numbers(name, *value)(file)
        else:
            number(name, value)(file)
    for key, n in rows.items():
        is_vector = key.endswith("ssm_a")
        name = key if is_vector else f"{key}.weight"
        shape = [n] if is_vector else [keys["embedding_length"], n]
        file.tensors.append(Tensor(name.encode(), shape, 0 if is_vector else 12, 0))
    path = tmp_path / "model.gguf"
    path.write_bytes(file.packed())
    check(path)


def test_the_bundled_model_passes(real_model: Path) -> None:
    check(real_model)


def test_all_parts_of_a_model_are_looked_at(tmp_path: Path, tiny: Tiny) -> None:
    whole = tiny("llama").read_bytes()
    file = parse(whole)
    kind("blk.1.ffn_up.weight", 27)(file)
    first, second = (tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2))
    first.write_bytes(whole)
    second.write_bytes(whole)
    check(first)
    second.write_bytes(file.packed())
    with pytest.raises(ModelFormatError, match=r"ffn_up.weight' is of type I64"):
        check(first)


def test_a_trusted_file_is_not_checked(tmp_path: Path, tiny: Tiny) -> None:
    file = parse(tiny("llama").read_bytes())
    token(7, b"seven")(file)  # nothing that ends the process by itself
    path = tmp_path / "model.gguf"
    path.write_bytes(file.packed())
    with pytest.raises(ModelFormatError, match="no token for the byte 4"):
        load_model(Loading(path))
    load_model(Loading(path, trust_model=True)).close()


def test_what_llama_cpp_quotes_of_a_file_is_a_short_line(tmp_path: Path, tiny: Tiny) -> None:
    file = parse(tiny("llama").read_bytes())
    text("general.architecture", b"two\nlines \x1b]0;title\x07\xff\xe2\x80\xae" * 100)(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.packed())
    with pytest.raises(ModelFormatError, match="two lines") as caught:
        Model(path)
    said = str(caught.value).replace(str(path), "")
    assert said.isprintable()
    assert len(said) < 360


def test_a_token_without_a_spelling_is_nothing_wrong(tmp_path: Path, tiny: Tiny) -> None:
    file = parse(tiny("llama").read_bytes())
    for place in (300, 301):
        token(place, b"")(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.packed())
    check(path)
