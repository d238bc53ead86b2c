"""llama.cpp made safe: loading it, and a model's weights and vocabulary.

llama.cpp answers some mistakes by ending the process. Everything here that could lead to one is
checked in Python first and raised as an error of `amulet_gguf.errors`. Left are files that contradict
themselves: `checks` refuses what is known to end it, and `amulet_gguf.models.trial` tries new files.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from amulet_gguf.errors import EngineError, ModelFormatError, NoRoomError, SettingError
from amulet_gguf.llama.cache import check_cache_type
from amulet_gguf.llama.gguf import Header, check_magic, read_model, shown
from amulet_gguf.llama.handle import Handle, Owner, check_process, in_use, note_use
from amulet_gguf.llama.rpc import add_servers, has_device, parse_servers
from amulet_gguf.method.arrays import Tokens

# Both are read when the libraries load. Spinning OpenMP barriers make two processes that share the
# cores a hundred times slower; a thousand spins keep a lone process as fast. And without the second,
# a failed assertion inside ggml would start a debugger before it ends the process.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

from llama_cpp import llama_cpp


@atexit.register
def _close_null_files() -> None:
    # llama_cpp opens both when it is imported and leaves them open, of which `python -X dev` complains.
    utils = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file"):
        if (file := getattr(utils, name, None)) is not None:
            file.close()


lib = llama_cpp  # others take it from here, so that it never loads before the lines above

logger = logging.getLogger(__name__)

_SPECIAL: Final = (
    lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN
)
_GGML_LOG_ERROR: Final = 4
_MAX_GPU_LAYERS: Final = 100_000
_MAX_QUOTED: Final = 200
_NO_DEVICES: Final = ctypes.c_void_p()  # a list of devices, which ends with a null pointer
recent_errors: deque[str] = deque(maxlen=4)
_setup_lock = threading.Lock()
_is_set_up = False


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _data: object) -> None:
    line = text.decode("utf-8", "replace").strip()
    if level == _GGML_LOG_ERROR:
        recent_errors.append(line)
    logger.debug("%s", line)


def _set_up() -> None:
    global _is_set_up
    with _setup_lock:
        if not _is_set_up:
            lib.llama_log_set(_on_log, ctypes.c_void_p(0))
            lib.llama_backend_init()
            _is_set_up = True


def can_offload() -> bool:
    """Tell whether llama.cpp can run layers elsewhere than on the CPU of this machine."""
    _set_up()  # devices are looked for at the first question, and talk
    # llama.cpp itself takes RPC for a device, even without any server.
    found = has_device() if lib.llama_supports_rpc() else bool(lib.llama_supports_gpu_offload())
    if found:
        note_use()  # a driver runs by now, and does not survive a fork
    return found


class Model(Owner):
    """The weights and vocabulary of a GGUF file, loaded once, for any thread; `close` it, or use `with`.

    Its memory is freed when its contexts are, too.

    Attributes:
        path: the file.
        n_vocab: tokens of the vocabulary, V.
        n_ctx_train: tokens of context the model was trained on.
        n_gpu_layers: layers asked to run on the GPU; -1 means all.
        cache_type: of the numbers in the KV caches of its contexts, a name of `CACHE_TYPES`.
        chat_template: Jinja, or None: its file has none, and nobody gave another.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n_gpu_layers: int | None = None,
        cache_type: str = "f16",
        rpc: str | None = None,
        chat_template: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Load a model.

        Args:
            path: a GGUF file; for a split one, its first part.
            n_gpu_layers: layers to run on the GPU, -1 for all. None: all where the installed llama.cpp
                can offload, else 0. `amulet_gguf.llama.devices.offload` tells how many fit.
            cache_type: "f16", "q8_0" or "q4_0".
            rpc: RPC servers whose devices count as GPUs, "HOST:PORT,HOST:PORT". All models that the
                process loads later use them too.
            chat_template: instead of the file's own.
            progress: called with the fraction loaded, from 0 to 1.

        Raises:
            ModelNotFoundError: no such file.
            ModelFormatError: not a GGUF file, a damaged one, or not a model that writes text.
            SettingError: n_gpu_layers out of range, a cache_type that the model cannot have, or rpc
                malformed or not built in.
            EngineError: an RPC server cannot be reached.
            NoRoomError: llama.cpp could not have the memory.
            ClosedError: this process was forked from one that used llama.cpp.
        """
        check_process()
        if n_gpu_layers is not None and not -1 <= n_gpu_layers <= _MAX_GPU_LAYERS:
            raise SettingError(f"n_gpu_layers must be from -1 to {_MAX_GPU_LAYERS}, got {n_gpu_layers}")
        servers = [] if rpc is None else parse_servers(rpc)
        self.path = Path(path)
        check_magic(self.path)
        if cache_type != "f16":
            check_cache_type(self.header, cache_type)
        self.cache_type = cache_type
        _set_up()
        if servers:
            add_servers(servers)
        if n_gpu_layers is None:
            n_gpu_layers = -1 if can_offload() else 0
        self.n_gpu_layers = n_gpu_layers
        handle = Handle(_load(self.path, n_gpu_layers, progress), lib.llama_model_free)
        self._vocabulary: Handle | None = Handle(lib.llama_model_get_vocab(handle), needs=handle)
        super().__init__(handle, "model")
        try:
            self._check_writes_text()
        except ModelFormatError:
            self.close()
            raise
        self.n_vocab = int(lib.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(handle))
        self.chat_template = chat_template or self.metadata("tokenizer.chat_template")

    def close(self) -> None:
        super().close()
        self._vocabulary = None

    @property
    def _vocab(self) -> Handle:
        vocabulary = self._vocabulary
        return self.handle if vocabulary is None else vocabulary  # the former raises

    def _check_token(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:  # llama.cpp ends the process
            raise EngineError(f"no token {token}: there are {self.n_vocab}")

    def _check_writes_text(self) -> None:
        model = self.handle
        architecture = self.metadata("general.architecture") or "unknown"
        pooling = self.metadata(f"{architecture}.pooling_type") or "0"
        causal = self.metadata(f"{architecture}.attention.causal") or "true"
        if pooling != "0" or causal == "false":
            kind = "an embedding model"
        elif lib.llama_model_has_encoder(model) or not lib.llama_model_has_decoder(model):
            kind = "an encoder-decoder model"
        elif lib.llama_model_is_diffusion(model):
            kind = "a diffusion model"
        elif lib.llama_vocab_type(lib.llama_model_get_vocab(model)) == lib.LLAMA_VOCAB_TYPE_NONE:
            kind = "a model without a tokenizer"
        else:
            return
        del model  # who keeps the error keeps what its frames hold
        raise ModelFormatError(
            f"{shown(self.path)} is {kind} ({architecture}): choose a model that writes text token by "
            "token"
        )

    def metadata(self, key: str) -> str | None:
        """Return a metadata value of the file as text, or None where it has no such key."""
        buffer = ctypes.create_string_buffer(1024)
        size = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        if size >= len(buffer):
            buffer = ctypes.create_string_buffer(size + 1)
            size = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return None if size < 0 else buffer.value.decode("utf-8", "replace")

    @property
    def share_on_gpu(self) -> float:
        """How many of the layers were asked to run on a GPU, from 0 to 1."""
        if self.n_gpu_layers == 0 or not can_offload():
            return 0.0
        n_layers = lib.llama_model_n_layer(self.handle) + 1  # the output counts as one
        return 1.0 if self.n_gpu_layers < 0 else min(1.0, self.n_gpu_layers / n_layers)

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return int(lib.llama_model_n_params(self.handle))

    @functools.cached_property
    def header(self) -> Header:
        """What its files say about it."""
        return read_model(self.path)

    @property
    def bos(self) -> int:
        """The token that begins a text, or -1."""
        return int(lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """The token that ends a text, or -1."""
        return int(lib.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt is to begin with `bos`."""
        return bool(lib.llama_vocab_get_add_bos(self._vocab))

    def ends_generation(self, token: int) -> bool:
        """Tell whether a token ends an answer (end of text, end of turn, …)."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))

    @functools.cached_property
    def end_tokens(self) -> Tokens:
        """The tokens that end an answer, (n,) int32, ascending."""
        vocab = self._vocab
        ends = [token for token in range(self.n_vocab) if lib.llama_vocab_is_eog(vocab, token)]
        return np.array(ends, np.int32)

    def token_text(self, token: int) -> str:
        """Return the vocabulary's own spelling of a token: "<|im_end|>", "Ġthe"."""
        self._check_token(token)
        text: bytes = lib.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def special_texts(self) -> list[str]:
        """Return the texts that tokenization with `special` turns into tokens with a meaning.

        Whitespace is left out: some vocabularies hold runs of blanks as such tokens.
        """
        vocab = self._vocab
        texts = (
            self.token_text(token)
            for token in range(self.n_vocab)
            if lib.llama_vocab_get_attr(vocab, token) & _SPECIAL
        )
        return [text for text in texts if text.strip()]

    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        """Return the tokens of a text, (n,) int32, with nothing added at its ends.

        Args:
            text: any text; lone surrogates become "?".
            special: let texts such as "<|im_end|>" become the control tokens they name.
        """
        data = text.encode("utf-8", "replace")
        size = len(data) + 16  # never fewer bytes than tokens, but for a space prefixed to each part
        while True:
            buffer = np.empty(size, np.int32)
            into = buffer.ctypes.data_as(lib.llama_token_p)
            count = lib.llama_tokenize(self._vocab, data, len(data), into, size, False, special)
            if count >= 0:
                return buffer[:count].copy()
            size = -count

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes a token stands for: none for control tokens, part of a character maybe."""
        self._check_token(token)
        buffer = ctypes.create_string_buffer(64)  # each call its own: threads share the model
        size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[:size]


def because() -> str:
    """Return the first complaint of llama.cpp since the last call, without the name of its function.

    It may quote the file: what cannot be printed is left out, and so is what is too long.
    """
    if not recent_errors:
        return ""
    words = " ".join(recent_errors[0].split(": ", 1)[-1].split())
    words = "".join(letter for letter in words if letter.isprintable())
    return f": {words}" if len(words) <= _MAX_QUOTED else f": {words[:_MAX_QUOTED]}…"


def ran_out() -> bool:
    """Tell whether llama.cpp complained of a want of memory in what it was last asked to do."""
    return any("allocat" in line or "out of memory" in line for line in recent_errors)


def _load(path: Path, n_gpu_layers: int, progress: Callable[[float], None] | None) -> int:
    failure: list[BaseException] = []

    def on_progress(fraction: float, _data: object) -> bool:
        try:  # ctypes swallows what a callback raises, a KeyboardInterrupt too
            check_process()
            if progress is not None:
                progress(fraction)
        except BaseException as error:
            failure.append(error)
        return not failure

    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = n_gpu_layers
    if n_gpu_layers == 0:  # or else prompts would be read on a GPU, and take its memory
        parameters.devices = ctypes.addressof(_NO_DEVICES)
    in_use.add(on_progress)
    parameters.progress_callback = lib.llama_progress_callback(on_progress)
    recent_errors.clear()
    model: int = lib.llama_model_load_from_file(os.fsencode(path), parameters)
    if failure:
        if model:
            lib.llama_model_free(model)
        raise failure[0]
    if not model and ran_out():
        raise NoRoomError(
            f"{path} does not fit into the memory{because()}: lower n_gpu_layers, or choose a smaller "
            "model or quantization"
        )
    if not model:
        raise ModelFormatError(
            f"llama.cpp cannot load {shown(path)}{because()}: the file is damaged or incomplete, or of "
            "a kind that this version does not know; download it again"
        )
    return model
