"""Tiny random-weight GGUF models, so that the tests need no download and run in milliseconds.

The weights mean nothing, but they are scaled so that the logits behave like a language model's:
spread out, dependent on the whole context, and with an end of turn now and then.  Channel 0 of
the residual stream is a constant that no layer writes to; the output rows read it as a bias,
which is how control and byte tokens are made rare without being impossible.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import TokenType

Array = npt.NDArray[np.float32]
Tensors = Mapping[str, str]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Merges are learned from this text, so that each piece can be reached through smaller pieces.
CORPUS = """
the of and to in is that it for was on with as are at this be have from or by not but what all
were when we there can an your which their said if do will each about how up out them then she
many some so these would other into has more her two like him see time could no make than first
been its who now people my made over did down only way find use may water long little very after
words called just where most know get through back much before go good new write our used me man
too any day same right look think also around another came come work three word must because does
part even place well such here take why things help put years different away again off went old
number great tell men say small every found still between name should home big give air line set
own under read last never us left end along while might next sound below saw something thought
both few those always looked show large often together asked house world going want school
important until form food keep children feet land side without boy once animals life enough took
sometimes four head above kind began almost live page got earth need far hand high year mother
light parts country father let night following picture being study second eyes soon times story
boys since white days ever paper hard near sentence better best across during today others however
sure means knew try told young miles sun ways thing whole hear example heard several change answer
room sea against top turned learn point city play toward five using himself usually
reading writing making looking working thinking helping asking learning changing playing testing
the the the the of of of and and and to to to in in is is you you that it question user assistant
"""
MERGE_COUNT = 240

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>")
TOOL_TOKEN = "<tool>"

# Added to the logits of a kind of token: about one token in a hundred is a control token, and
# one in ten a byte, which also makes incomplete UTF-8 common enough to be tested.
LOGIT_BIAS = {TokenType.CONTROL: 1.3, TokenType.BYTE: -1.5, TokenType.UNKNOWN: -1.5}
LOGIT_SCALE = 1.7


@dataclass
class Vocabulary:
    """The tokens of a model, in the columns in which a GGUF file stores them."""

    model: str
    pre: str
    texts: list[str] = field(default_factory=list)
    types: list[TokenType] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)  # of the logits; not stored as such
    merges: list[str] = field(default_factory=list)
    special: dict[str, str] = field(default_factory=dict)

    def add(
        self,
        text: str,
        kind: TokenType = TokenType.NORMAL,
        *,
        score: float = 0.0,
        bias_as: TokenType | None = None,
    ) -> None:
        """Append a token unless it is there already (a letter may also be a learned piece)."""
        if text not in self.texts:
            self.texts.append(text)
            self.types.append(kind)
            self.scores.append(score)
            self.biases.append(LOGIT_BIAS.get(bias_as or kind, 0.0))

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Store the columns; the prefix space is off, so that text comes back as it went in."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.texts)
        writer.add_token_scores(self.scores)
        writer.add_token_types([int(kind) for kind in self.types])
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, text in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{role}_token_id", self.texts.index(text))
        writer.add_add_bos_token(self.model != "gpt2")
        writer.add_add_space_prefix(False)


def learn_merges(space: str, count: int = MERGE_COUNT) -> list[tuple[str, str]]:
    """Byte-pair merges of CORPUS; both the SentencePiece and the BPE vocabulary use them."""
    words = Counter(tuple(space + word) for word in CORPUS.split())
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = Counter({_merge(word, best): times for word, times in words.items()})
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The word with each occurrence of the pair joined."""
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


def sentencepiece_vocabulary() -> Vocabulary:
    """A Llama-style vocabulary with byte fallback: any text can be tokenized."""
    special = {"unknown": "<unk>", "bos": "<s>", "eos": "<|im_end|>", "eot": "<|im_end|>"}
    vocabulary = Vocabulary("llama", "default", special=special)
    vocabulary.add("<unk>", TokenType.UNKNOWN)
    for text in ("<s>", "</s>"):
        vocabulary.add(text, TokenType.CONTROL)
    for byte in range(256):
        vocabulary.add(f"<0x{byte:02X}>", TokenType.BYTE)
    for rank, pair in enumerate(learn_merges("▁"), 1):
        vocabulary.add("".join(pair), score=-float(rank))
    for letter in ["▁", *map(chr, range(0x21, 0x7F))]:
        vocabulary.add(letter, score=-1000.0)
    _add_chat_tokens(vocabulary)
    return vocabulary


def byte_level_vocabulary() -> Vocabulary:
    """A Qwen-style byte-level BPE vocabulary."""
    special = {"bos": "<|endoftext|>", "padding": "<|endoftext|>", "eos": "<|im_end|>"}
    vocabulary = Vocabulary("gpt2", "qwen2", special=special)
    # GPT-2's map: printable Latin-1 bytes stand for themselves, the others follow from U+0100.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [byte for byte in range(256) if byte not in printable]
    for byte in range(256):
        character = chr(byte if byte in printable else 256 + shifted.index(byte))
        vocabulary.add(character, bias_as=None if character.isascii() else TokenType.BYTE)
    for left, right in learn_merges("Ġ"):
        vocabulary.merges.append(f"{left} {right}")
        vocabulary.add(left + right)
    vocabulary.add("<|endoftext|>", TokenType.CONTROL)
    _add_chat_tokens(vocabulary)
    return vocabulary


def wordpiece_vocabulary() -> Vocabulary:
    """A BERT-style vocabulary; GGUF marks the starts of words instead of their continuations."""
    special = {"padding": "[PAD]", "unknown": "[UNK]", "bos": "[CLS]", "cls": "[CLS]",
               "eos": "[SEP]", "seperator": "[SEP]", "mask": "[MASK]"}  # fmt: skip
    vocabulary = Vocabulary("bert", "default", special=special)
    for text in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
        vocabulary.add(text, TokenType.UNKNOWN if text == "[UNK]" else TokenType.CONTROL)
    for letter in map(chr, range(0x21, 0x7F)):
        vocabulary.add(letter)
        vocabulary.add("▁" + letter)
    for pair in learn_merges("▁"):
        vocabulary.add("".join(pair))
    return vocabulary


def _add_chat_tokens(vocabulary: Vocabulary) -> None:
    """The markers of the chat template, and one token that is special but not control."""
    for text in CONTROL_TOKENS:
        vocabulary.add(text, TokenType.CONTROL)
    vocabulary.add(TOOL_TOKEN, TokenType.USER_DEFINED)


# A tensor's shape is written with the letters of SIZES, rows first (the reverse of ggml's order).
# d: model, f: feed-forward, q/k/h: all queries, all keys, one head, t: three gates of lfm2,
# i/j: inner width of mamba and its double, s: state, r: time-step rank, x: r + 2 s, c: kernel.
SIZES = {"d": 64, "f": 80, "q": 64, "k": 32, "h": 32, "t": 192,
         "i": 128, "j": 256, "s": 8, "r": 8, "x": 24, "c": 4}  # fmt: skip
SLIDING_WINDOW = 32

FEED_FORWARD = {"ffn_norm.weight": "d", "ffn_gate.weight": "fd", "ffn_up.weight": "fd",
                "ffn_down.weight": "df"}  # fmt: skip
ATTENTION = {"attn_norm.weight": "d", "attn_q.weight": "qd", "attn_k.weight": "kd",
             "attn_v.weight": "kd", "attn_output.weight": "dq"}  # fmt: skip
HEAD_NORMS = {"attn_q_norm.weight": "h", "attn_k_norm.weight": "h"}
POST_NORMS = {"post_attention_norm.weight": "d", "post_ffw_norm.weight": "d"}
SHORT_CONVOLUTION = {"attn_norm.weight": "d", "shortconv.conv.weight": "dc",
                     "shortconv.in_proj.weight": "td", "shortconv.out_proj.weight": "dd",
                     }  # fmt: skip
STATE_SPACE = {"attn_norm.weight": "d", "ssm_in.weight": "jd", "ssm_conv1d.weight": "ic",
               "ssm_conv1d.bias": "i", "ssm_x.weight": "xi", "ssm_dt.weight": "ir",
               "ssm_dt.bias": "i", "ssm_a": "is", "ssm_d": "i", "ssm_out.weight": "di",
               }  # fmt: skip
ENCODER = {
    f"{name}.{part}": shape if part == "weight" else shape[0]
    for name, shape in {"attn_q": "qd", "attn_k": "qd", "attn_v": "qd", "attn_output": "dq",
                        "attn_output_norm": "d", "ffn_up": "fd", "ffn_down": "df",
                        "layer_output_norm": "d"}.items()
    for part in ("weight", "bias")
}  # fmt: skip
# The matrices that write into the residual stream, with their gains (found by trial: the layers
# must neither vanish beside the token's own embedding nor drown the constant channel).
RESIDUAL_GAINS = {"attn_output.weight": 2.0, "ffn_down.weight": 2.0,
                  "shortconv.out_proj.weight": 2.0, "ssm_out.weight": 0.3}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """What sets an architecture apart: its layers, its last norm and how it reads embeddings."""

    layers: tuple[Tensors, ...]
    output_norm: str = "output_norm"
    embedding_factor: float = 1.0  # what the graph itself multiplies the embeddings by
    byte_level: bool = False


_SPECS = {
    "llama": Architecture(({**ATTENTION, **FEED_FORWARD},) * 2),
    "qwen3": Architecture(({**ATTENTION, **HEAD_NORMS, **FEED_FORWARD},) * 2, byte_level=True),
    "gemma3": Architecture(
        ({**ATTENTION, **HEAD_NORMS, **FEED_FORWARD, **POST_NORMS},) * 3, embedding_factor=8.0
    ),
    "mamba": Architecture((STATE_SPACE,) * 2),
    "lfm2": Architecture(
        ({**SHORT_CONVOLUTION, **FEED_FORWARD}, {**ATTENTION, **HEAD_NORMS, **FEED_FORWARD}),
        output_norm="token_embd_norm",
    ),
}
ARCHITECTURES = tuple(_SPECS)


def _initial(name: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    """Random values that keep activations near unit size whatever the layer."""
    noise = random.standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.1 * noise
    elif name.startswith("ssm_a"):  # decay rates of the states, slow enough to remember a prompt
        values = np.broadcast_to(-np.geomspace(0.02, 1.0, shape[1]), shape)
    elif name.startswith("ssm_dt.bias"):  # softplus of it: steps of 0.01 to 0.5, long and short
        values = np.log(np.expm1(np.geomspace(0.01, 0.5, shape[0])))
    elif name.startswith("ssm_x"):  # strong, so that the state outweighs the last token
        values = 3 * noise / np.sqrt(shape[-1])
    elif len(shape) == 1:
        values = 0.1 * noise
    else:
        values = noise / np.sqrt(shape[-1])
    if name.startswith("attn_q_norm"):
        values *= 2  # sharper attention: what was said matters, not just how much
    if name in RESIDUAL_GAINS:
        values *= RESIDUAL_GAINS[name]
        values[0] = 0  # the constant channel
    return np.ascontiguousarray(values, dtype=np.float32)


def _layer_tensors(
    layers: tuple[Tensors, ...], random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    for index, tensors in enumerate(layers):
        for name, letters in tensors.items():
            shape = tuple(SIZES[letter] for letter in letters)
            yield f"blk.{index}.{name}", _initial(name, shape, random)


def _output_rows(vocabulary: Vocabulary, random: np.random.Generator) -> Array:
    """Logit rows of a known spread, with the bias of each token in channel 0."""
    size = SIZES["d"]
    rows = random.standard_normal((len(vocabulary.texts), size)) * LOGIT_SCALE / np.sqrt(size)
    # Little but the bias for control tokens, so that no context makes one the likeliest token.
    rows[[kind is TokenType.CONTROL for kind in vocabulary.types]] *= 0.3
    rows[:, 0] = vocabulary.biases
    return np.asarray(rows, dtype=np.float32)


def _write_settings(writer: gguf.GGUFWriter, name: str, spec: Architecture) -> None:
    """The hyperparameters; those an architecture does not know are ignored by llama.cpp."""
    recurrent = ["attn_q.weight" not in tensors for tensors in spec.layers]
    writer.add_embedding_length(SIZES["d"])
    writer.add_block_count(len(spec.layers))
    writer.add_layer_norm_rms_eps(1e-5)
    if all(recurrent):
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(SIZES["c"])
        writer.add_ssm_inner_size(SIZES["i"])
        writer.add_ssm_state_size(SIZES["s"])
        writer.add_ssm_time_step_rank(SIZES["r"])
        return
    heads = SIZES["k"] // SIZES["h"]
    writer.add_feed_forward_length(SIZES["f"])
    writer.add_head_count(SIZES["q"] // SIZES["h"])
    writer.add_head_count_kv([0 if flag else heads for flag in recurrent])
    writer.add_key_length(SIZES["h"])
    writer.add_value_length(SIZES["h"])
    writer.add_rope_dimension_count(SIZES["h"])
    writer.add_rope_freq_base(10_000.0)
    if name == "gemma3":
        writer.add_sliding_window(SLIDING_WINDOW)
        writer.add_sliding_window_pattern(len(spec.layers))  # the last layer is the global one
    if any(recurrent):
        writer.add_shortconv_l_cache(SIZES["c"])


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build(
    architecture: str,
    path: Path,
    *,
    seed: int = 0,
    context_length: int = 2048,
    chat_template: str | None = CHATML,
    corrupt_nan: bool = False,
    control_tokens: Iterable[str] = (),
) -> Path:
    """Write a model that generates; `corrupt_nan` gives its last token (<tool>) a NaN logit."""
    spec = _SPECS[architecture]
    random = np.random.default_rng(seed)
    vocabulary = byte_level_vocabulary() if spec.byte_level else sentencepiece_vocabulary()
    for text in control_tokens:
        vocabulary.add(text, TokenType.CONTROL)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"tiny-{architecture}")
    writer.add_context_length(context_length)
    _write_settings(writer, architecture, spec)
    vocabulary.write(writer)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    embeddings = random.standard_normal((len(vocabulary.texts), SIZES["d"])) * 0.7
    embeddings[:, 0] = 2.0
    output = _output_rows(vocabulary, random)
    if corrupt_nan:
        output[-1, -1] = np.nan
    writer.add_tensor("token_embd.weight", (embeddings / spec.embedding_factor).astype(np.float32))
    writer.add_tensor("output.weight", output)
    writer.add_tensor(f"{spec.output_norm}.weight", np.ones(SIZES["d"], np.float32))
    for name, values in _layer_tensors(spec.layers, random):
        writer.add_tensor(name, values)
    return _finish(writer, path)


def build_embedding_only(path: Path, *, seed: int = 0, context_length: int = 512) -> Path:
    """Write an encoder (BERT), which llama.cpp loads but which has no logits to sample from."""
    random = np.random.default_rng(seed)
    vocabulary = wordpiece_vocabulary()
    layers = (ENCODER,) * 2
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("tiny-bert")
    writer.add_context_length(context_length)
    writer.add_embedding_length(SIZES["d"])
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(SIZES["f"])
    writer.add_head_count(SIZES["q"] // SIZES["h"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(2)
    vocabulary.write(writer)
    rows = {"token_embd": len(vocabulary.texts), "position_embd": context_length, "token_types": 2}
    for name, count in rows.items():
        values = random.standard_normal((count, SIZES["d"])).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    for part in ("weight", "bias"):
        name = f"token_embd_norm.{part}"
        writer.add_tensor(name, _initial(name, (SIZES["d"],), random))
    for name, values in _layer_tensors(layers, random):
        writer.add_tensor(name, values)
    return _finish(writer, path)


def main(directory: Path) -> None:
    """Write every model, for looking at them by hand."""
    paths = [build(name, directory / f"{name}.gguf") for name in ARCHITECTURES]
    paths.append(build("llama", directory / "llama-nan.gguf", corrupt_nan=True))
    paths.append(build_embedding_only(directory / "bert.gguf"))
    for path in paths:
        print(f"{path.name:16} {path.stat().st_size:8,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
