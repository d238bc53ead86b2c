"""Sequences of a model side by side in one context of llama.cpp: rows in, logits out."""

from __future__ import annotations

import ctypes

import numpy as np

from amulet_gguf.errors import EngineError, NoRoomError, SettingError
from amulet_gguf.llama.cache import CACHE_TYPES
from amulet_gguf.llama.devices import N_BATCH
from amulet_gguf.llama.handle import Handle, Owner
from amulet_gguf.llama.memory import DEFAULT_N_BATCH, check_context
from amulet_gguf.llama.model import Model, because, lib, ran_out, recent_errors
from amulet_gguf.llama.state import fit_streams
from amulet_gguf.llama.threads import Threads, default_threads, times
from amulet_gguf.method.arrays import Float32Array, Tokens


def max_sequences() -> int:
    """Return how many sequences llama.cpp can hold in one context."""
    return int(lib.llama_max_parallel_sequences())


class _Logits:
    """Rows in a context's memory, which is not freed before the arrays that show them."""

    def __init__(self, context: Handle, shape: tuple[int, int]) -> None:
        self._context = context
        address = ctypes.addressof(lib.llama_get_logits(context).contents)
        self.__array_interface__ = {
            "version": 3, "typestr": np.dtype(np.float32).str, "data": (address, False), "shape": shape,
        }  # fmt: skip


class Context(Owner):
    """Sequences of one model side by side: rows are added, then decoded together.

    Each sequence has a KV cache of its own, so that it reads the same whatever its neighbours hold.
    Not safe for use by two threads at once, but for `close`.

    Attributes:
        n_ctx: tokens each sequence can hold (what was asked, rounded up to a multiple of 256).
        n_sequences: how many there are; they are numbered from 0.
        n_batch: rows one `decode` takes at most.
        n_threads: CPU threads of one `decode`.
        chosen_threads: the same if somebody chose them; None: they follow what is free.
        n_outputs: rows of logits that one `decode` can give.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_sequences: int,
        n_batch: int | None = None,
        n_threads: int | None = None,
        n_outputs: int | None = None,
    ) -> None:
        """Reserve the memory: KV cache of n_ctx * n_sequences tokens, and work space.

        Args:
            model: must stay open for as long as the context is used.
            n_ctx: tokens per sequence, at least 1.
            n_sequences: from 1 to `max_sequences()`.
            n_batch: rows per decode, at least n_sequences. None: 512 on a GPU, else 128, with which a
                CPU is as fast, needs less memory, and answers to an interruption sooner.
            n_threads: None: `default_threads()`, and fewer while other programs are busy.
            n_outputs: rows of logits that one decode can give; each takes V * 4 bytes. None: one per
                sequence.

        Raises:
            SettingError: an argument out of range.
            NoRoomError: llama.cpp could not have the memory.
            EngineError: it would not fit, or llama.cpp failed.
        """
        is_offloaded = model.share_on_gpu > 0
        if n_batch is None:
            n_batch = max(n_sequences, N_BATCH if is_offloaded else DEFAULT_N_BATCH)
        if n_ctx < 1:
            raise SettingError(f"n_ctx must be at least 1, got {n_ctx}")
        if not 1 <= n_sequences <= max_sequences():
            raise SettingError(f"n_sequences must be from 1 to {max_sequences()}, got {n_sequences}")
        if not n_sequences <= n_batch < 2**31:
            raise SettingError(f"n_batch must be from {n_sequences} to {2**31 - 1}, got {n_batch}")
        n_outputs = n_sequences if n_outputs is None else n_outputs
        if not n_sequences <= n_outputs <= n_batch:
            raise SettingError(f"n_outputs must be from {n_sequences} to {n_batch}, got {n_outputs}")
        self.chosen_threads = n_threads
        self.n_threads = default_threads() if n_threads is None else n_threads
        if not 1 <= self.n_threads <= 1024:
            raise SettingError(f"n_threads must be from 1 to 1024, got {n_threads}")
        # Not unified, a context divides its cells by its sequences; ggml wants multiples of 256.
        n_ctx = -(-n_ctx // 256) * 256
        if n_ctx * n_sequences >= 2**31:
            raise SettingError(
                f"a context of {n_ctx} tokens for {n_sequences} sequences is too large: lower n_ctx"
            )

        if not is_offloaded:  # a GPU's own memory: llama.cpp tells when there is no room
            check_context(model.header, n_ctx, n_sequences, n_batch, model.cache_type)

        parameters = lib.llama_context_default_params()
        parameters.n_ctx = n_ctx * n_sequences
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_seq_max = n_sequences
        parameters.n_outputs_max = n_outputs
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        parameters.kv_unified = False
        cache_type = CACHE_TYPES[model.cache_type]
        parameters.type_k = parameters.type_v = cache_type.kind
        if cache_type.is_quantized:  # other ways of attention cannot read such values
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        elif not is_offloaded:
            # On a CPU, reading at 2,000 tokens of context is 1.2 to 1.7 times as fast without.
            parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.model = model
        recent_errors.clear()
        weights = model.handle
        pointer = lib.llama_init_from_model(weights, parameters)
        if not pointer:
            del weights  # who keeps the error keeps what its frames hold
            failure = NoRoomError if ran_out() else EngineError
            raise failure(
                f"llama.cpp could not make a context of {n_sequences} x {n_ctx} tokens"
                f"{because()}: lower n_ctx or the number of preferences"
            )
        # A number that somebody chose stays; on a GPU, the process waits.
        watches = n_threads is None and not is_offloaded and self.n_threads > 1
        self._watch = Threads(self.n_threads) if watches else None
        context = Handle(pointer, lib.llama_free, needs=weights)
        super().__init__(context, "context")
        self.n_ctx = int(lib.llama_n_ctx_seq(context))
        self.n_sequences = n_sequences
        self.n_batch = int(lib.llama_n_batch(context))
        self.n_outputs = n_outputs
        self._lengths = [0] * n_sequences

        # llama.cpp reads the batch from these arrays; filling them by slices costs microseconds.
        self._tokens = np.zeros(self.n_batch, np.int32)
        self._positions = np.zeros(self.n_batch, np.int32)
        self._sequences = np.zeros(self.n_batch, np.int32)
        self._outputs = np.zeros(self.n_batch, np.int8)
        self._ones = np.ones(self.n_batch, np.int32)
        start = self._sequences.ctypes.data
        self._sequence_pointers = np.arange(start, start + 4 * self.n_batch, 4, dtype=np.uintp)
        self._batch = lib.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            embd=None,
            pos=self._positions.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            n_seq_id=self._ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequence_pointers.ctypes.data_as(
                ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))
            ),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._n_rows = 0
        self._n_outputs = 0

    @property
    def handle(self) -> Handle:
        self.model.handle  # noqa: B018  (raises when closed)
        return super().handle

    @property
    def room(self) -> int:
        """Rows that can still be added before `decode`."""
        return self.n_batch - self._n_rows

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds, rows added but not yet decoded included."""
        return self._lengths[sequence]

    def add(self, sequence: int, tokens: Tokens, *, output: bool, n_outputs: int = 1) -> None:
        """Append tokens to a sequence in the next `decode`.

        Sequences of one batch must be added in ascending order, each at most once: llama.cpp reads
        the weights once for rows of neighbouring ascending sequences, and again after any gap.

        Args:
            sequence: its number.
            tokens: (n,) int32, n >= 1.
            output: ask for the logits after the last of them,
            n_outputs: or after so many of the last.

        Raises:
            EngineError: no such sequence or token, or no room for them.
        """
        self.handle  # noqa: B018  (raises when closed)
        n = len(tokens)
        start = self._n_rows
        if not 0 <= sequence < self.n_sequences:
            raise EngineError(f"no sequence {sequence}: there are {self.n_sequences}")
        if start and self._sequences[start - 1] >= sequence:
            raise EngineError(f"sequence {sequence} was added after {self._sequences[start - 1]}")
        if not 1 <= n <= self.room:
            raise EngineError(f"{n} rows do not fit: {self.room} of {self.n_batch} are left")
        position = self._lengths[sequence]
        if position + n > self.n_ctx:
            raise EngineError(f"{position} + {n} tokens do not fit into a context of {self.n_ctx}")
        if tokens.view(np.uint32).max() >= self.model.n_vocab:  # those below 0 are the largest so
            raise EngineError(f"a token lies outside the vocabulary of {self.model.n_vocab}")
        asked = min(n, n_outputs) if output else 0
        if self._n_outputs + asked > self.n_outputs:
            raise EngineError(f"logits of {self._n_outputs + asked} rows: {self.n_outputs} are made")
        rows = slice(start, start + n)
        self._tokens[rows] = tokens
        self._positions[rows] = np.arange(position, position + n)
        self._sequences[rows] = sequence
        self._outputs[rows] = 0
        self._outputs[start + n - asked : start + n] = 1
        self._lengths[sequence] = position + n
        self._n_rows += n
        self._n_outputs += asked

    def decode(self) -> Float32Array:
        """Run all added rows through the model in one pass.

        Returns:
            (outputs, V) float32 logits, in the order in which outputs were asked for. A view of
            llama.cpp's memory, valid until the next `decode`.

        Raises:
            EngineError: llama.cpp failed; the sequences of the batch are freed.
        """
        context = self.handle
        n_rows, n_outputs = self._n_rows, self._n_outputs
        if n_rows == 0:
            raise EngineError("there are no rows to decode")
        self._n_rows = self._n_outputs = 0
        self._batch.n_tokens = n_rows
        recent_errors.clear()
        start, computed = times()
        code = lib.llama_decode(context, self._batch)
        if self._watch is not None:
            now, by_now = times()
            if self._watch.note(now - start, by_now - computed, now):
                self.n_threads = self._watch.n
                lib.llama_set_n_threads(context, self.n_threads, self.n_threads)
        if code != 0:
            del context  # who keeps the error keeps what its frames hold
            for sequence in np.unique(self._sequences[:n_rows]).tolist():
                self.free(sequence)
            reason = "it found no room in the KV cache" if code == 1 else f"code {code}"
            raise EngineError(f"llama.cpp could not decode {n_rows} rows ({reason}{because()})")
        shape = (n_outputs, self.model.n_vocab)
        if n_outputs == 0:
            return np.empty(shape, np.float32)
        return np.asarray(_Logits(context, shape))

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds. The data moves at the next `decode`.

        Raises:
            EngineError: no such sequence, or rows of one wait for `decode`.
        """
        context = self.handle
        if not (0 <= source < self.n_sequences and 0 <= target < self.n_sequences):
            raise EngineError(f"no sequence {source} or {target}: there are {self.n_sequences}")
        if self._n_rows:
            raise EngineError("rows wait to be decoded: copy sequences before adding rows")
        if source != target:
            self.free(target)
            # Only whole sequences: without a unified cache, llama.cpp aborts on a part of one.
            lib.llama_memory_seq_cp(lib.llama_get_memory(context), source, target, -1, -1)
            self._lengths[target] = self._lengths[source]

    @property
    def can_truncate(self) -> bool:
        """Whether `truncate` can cut a sequence short. Recurrent layers keep one state for all that was
        read, not a cell per token, so that nothing can be taken back from it."""
        model = self.model.handle
        return not (lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model))

    @property
    def can_draft(self) -> bool:
        """Whether the last tokens of a sequence can be taken back at any time. A sliding window may have
        let go of what the earlier ones see."""
        return self.can_truncate and lib.llama_model_n_swa(self.model.handle) == 0

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence.

        Raises:
            EngineError: no such sequence or length, rows wait for `decode`, or the model cannot.
        """
        context = self.handle
        if not 0 <= sequence < self.n_sequences or not 0 <= length <= self._lengths[sequence]:
            raise EngineError(f"sequence {sequence} does not hold {length} tokens")
        if self._n_rows:
            raise EngineError("rows wait to be decoded: cut sequences before adding rows")
        if length == self._lengths[sequence]:
            return
        if length > 0 and not (
            self.can_truncate
            and lib.llama_memory_seq_rm(lib.llama_get_memory(context), sequence, length, -1)
        ):
            raise EngineError("the model's cache cannot be cut: free the sequence and read it again")
        if length == 0:
            self.free(sequence)
        self._lengths[sequence] = length

    def save(self, sequence: int) -> bytes:
        """Return the cache of a sequence, for `restore` of a context of the same model.

        Raises:
            EngineError: no such sequence, or rows wait for `decode`.
        """
        context = self.handle
        if not 0 <= sequence < self.n_sequences or self._n_rows:
            raise EngineError(f"sequence {sequence} cannot be saved now")
        size = lib.llama_state_seq_get_size(context, sequence)
        data = np.empty(size, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = lib.llama_state_seq_get_data(context, pointer, size, sequence)
        if written != size:
            raise EngineError(f"llama.cpp saved {written} of {size} bytes of a sequence")
        return data.tobytes()

    def restore(self, sequence: int, data: bytes, length: int) -> None:
        """Make a sequence hold what was saved; `length` is how many tokens that is.

        llama.cpp ends the process on damaged data: check where it comes from.

        Raises:
            EngineError: no such sequence, rows wait for `decode`, or the data do not fit.
        """
        context = self.handle
        if not 0 <= sequence < self.n_sequences or self._n_rows:
            raise EngineError(f"sequence {sequence} cannot be restored now")
        if length > self.n_ctx:
            raise EngineError(f"{length} tokens do not fit into a context of {self.n_ctx}")
        self.free(sequence)
        model = self.model.handle
        if self.can_truncate and lib.llama_model_n_swa(model) == 0:
            data = fit_streams(data, length, self.n_sequences)
        array = np.frombuffer(data, np.uint8)
        pointer = array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = lib.llama_state_seq_set_data(context, pointer, len(data), sequence)
        end = lib.llama_memory_seq_pos_max(lib.llama_get_memory(context), sequence)
        if read == 0 or end + 1 != length:
            self.free(sequence)
            raise EngineError(f"llama.cpp could not restore {length} tokens of a saved conversation")
        self._lengths[sequence] = length

    def free(self, sequence: int) -> None:
        """Empty a sequence."""
        context = self.handle
        if not 0 <= sequence < self.n_sequences:  # llama.cpp aborts, or for -1 frees all of them
            raise EngineError(f"no sequence {sequence}: there are {self.n_sequences}")
        if sequence in self._sequences[: self._n_rows]:
            raise EngineError(f"rows of sequence {sequence} wait to be decoded: decode or clear first")
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), sequence, -1, -1)
        self._lengths[sequence] = 0

    def clear(self) -> None:
        """Empty all sequences and forget rows that were added."""
        context = self.handle
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        self._lengths = [0] * self.n_sequences
        self._n_rows = self._n_outputs = 0
