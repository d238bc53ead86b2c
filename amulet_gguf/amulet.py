"""The face for Python: load a model, then stream, generate or compare answers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from amulet_gguf.engine.answer import Answer, Piece, Timings, Usage
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.generation import Generation
from amulet_gguf.errors import SettingError
from amulet_gguf.llama.context import Context
from amulet_gguf.llama.memory import DEFAULT_N_CTX, check_fits
from amulet_gguf.llama.model import Model, can_offload
from amulet_gguf.models.find import find_model
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.template import Message
from amulet_gguf.settings import Options, Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoadOptions(TypedDict, total=False):
    """Arguments of `Amulet.load` but for the path and what reports progress."""

    n_ctx: int | None
    n_gpu_layers: int | None
    n_threads: int | None
    n_batch: int | None
    n_sequences: int
    rpc: str | None


class Stream(Iterator[Piece]):
    """The pieces of an answer, as they are written. Closing it (or `with`) cancels the rest.

    `usage` and `timings` hold for what has been produced so far.
    """

    def __init__(
        self,
        engine: Engine,
        generation: Generation,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self._generation = generation

        def on_step(generation: Generation) -> None:
            if on_prefill is not None and generation.n_tokens == 0:
                on_prefill(generation.n_read, generation.n_prefill)

        self._pieces = engine.stream(generation, on_step)
        self._engine = engine

    def __next__(self) -> Piece:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is not written yet and free its memory."""
        self._pieces.close()
        self._engine.cancel(
            self._generation
        )  # a generator that was never started does not run its `finally`

    def cancel(self) -> None:
        """End the answer within a step; the pieces that are left can still be taken."""
        self._engine.cancel(self._generation)

    @property
    def is_finished(self) -> bool:
        """Nothing more will be written; the last pieces may not have been taken yet."""
        return self._generation.is_finished

    def answer(self, taken: Sequence[Piece] = ()) -> Answer:
        """Take the pieces that are left, and return the whole answer.

        Args:
            taken: those taken before.

        Raises:
            AmuletError: the generation failed.
        """
        return self._generation.answer([*taken, *self])

    @property
    def usage(self) -> Usage:
        return self._generation.usage

    @property
    def timings(self) -> Timings:
        return self._generation.timings


def check_n_ctx(n_ctx: int | None) -> None:
    """Raise SettingError unless n_ctx is None or a size that a context can have."""
    if n_ctx is not None and not 1 <= n_ctx <= 2**24:
        raise SettingError(f"n_ctx must be from 1 to {2**24}, got {n_ctx}")


class Amulet:
    """A loaded model that answers, realigned to preferences. Make one with `Amulet.load`.

    One thread writes its answers (see `Engine`); `AmuletService` answers several.
    """

    def __init__(self, model: Model, engine: Engine) -> None:
        self.model = model
        self.engine = engine
        self.planner = Planner(model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        n_gpu_layers: int | None = None,
        n_threads: int | None = None,
        n_batch: int | None = None,
        n_sequences: int = 2,
        rpc: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Amulet:
        """Load a model.

        Args:
            path: a GGUF file, or the name of an installed model; `amulet_gguf.models.find_model` says
                which names there are, and what None stands for.
            n_ctx: tokens of prompt and answer together. None: 4096, or what the model can if less.
            n_gpu_layers: layers to run on the GPU, negative for all. None: all if llama.cpp can.
            n_threads: CPU threads. None: one per physical core.
            n_batch: tokens read in one step. None: see `amulet_gguf.llama.context.Context`.
            n_sequences: memory to begin with, in branches that can run at once: a generation takes one
                for the base and one per preference. It grows when more are asked for.
            rpc: servers of llama.cpp that share the model, "HOST:PORT,HOST:PORT": see `Model`.
            progress: called with the fraction loaded, from 0 to 1.

        Raises:
            ModelNotFoundError, ModelFormatError: the file is missing or cannot be used.
            ConfigError: the default model is asked for, and the configuration has a mistake.
            SettingError: a number out of range, or rpc not possible.
            EngineError: not enough memory (see `amulet_gguf.llama.memory.check_fits`), or an RPC server
                cannot be reached.
        """
        check_n_ctx(n_ctx)
        file = find_model(path)
        if rpc is None and (n_gpu_layers == 0 or not can_offload()):
            check_fits(file, n_ctx, n_sequences)
        model = Model(file, n_gpu_layers=n_gpu_layers, rpc=rpc, progress=progress)
        try:
            return cls.of(
                model, n_ctx=n_ctx, n_threads=n_threads, n_batch=n_batch, n_sequences=n_sequences
            )
        except BaseException:
            model.close()
            raise

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int | None = None,
        n_sequences: int = 2,
    ) -> Amulet:
        """Run a model that is loaded, and close it in the end; arguments and errors as `load`."""
        check_n_ctx(n_ctx)
        size = n_ctx or min(DEFAULT_N_CTX, model.n_ctx_train or DEFAULT_N_CTX)

        def make_context(n_sequences: int) -> Context:
            return Context(
                model, n_ctx=size, n_sequences=n_sequences, n_batch=n_batch, n_threads=n_threads
            )

        engine = Engine(model, make_context, n_sequences)
        try:
            return cls(model, engine)
        except BaseException:
            engine.close()
            raise

    def __enter__(self) -> Amulet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and free all memory."""
        self.engine.close()
        self.model.close()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        settings: Settings | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Answer a prompt piece by piece.

        Args:
            prompt: the user's message.
            messages: a conversation instead: mappings with "role" (system, user, assistant) and
                "content", the last of the user.
            settings: where to start from; None means the defaults.
            on_prefill: called with the tokens of the prompt read so far and in all, as they are read.
            **options: fields of `Settings` that differ.

        Raises:
            SettingError, PromptError: at once, before anything is decoded. `PromptTooLongError` gives
                the counts.
            EngineError: from the iterator, if llama.cpp fails.
        """
        settings = dataclasses.replace(settings or Settings(), **options)  # type: ignore[arg-type]
        request = self.planner.request(prompt, messages, settings)
        return Stream(self.engine, self.engine.submit(request), on_prefill)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        settings: Settings | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Answer a prompt; arguments and errors as `stream`."""
        with self.stream(prompt, messages=messages, settings=settings, **options) as stream:
            return stream.answer()

    def compare(
        self,
        prompt: str | None,
        settings: Mapping[str, Settings],
        on_piece: Callable[[str, Piece], None] | None = None,
        *,
        messages: Sequence[Message] | None = None,
    ) -> dict[str, Answer]:
        """Answer one prompt with several settings, all at once in one context.

        Args:
            prompt, messages: as in `stream`. What is held of a conversation is reused.
            settings: by a name of your choice.
            on_piece: called with that name and each piece as it is written.

        Raises:
            As `stream`.
        """
        reuse = messages is not None
        requests = {
            name: self.planner.request(prompt, messages, each, reuse=reuse)
            for name, each in settings.items()
        }
        self.engine.reserve(sum(len(request.branches) for request in requests.values()))
        streams: dict[str, Stream] = {}
        pieces: dict[str, list[Piece]] = {name: [] for name in requests}
        try:
            for name, request in requests.items():
                streams[name] = Stream(self.engine, self.engine.submit(request), None)
            running = dict(streams)
            while running:
                for name, stream in list(running.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del running[name]
                        continue
                    pieces[name].append(piece)
                    if on_piece is not None:
                        on_piece(name, piece)
        finally:
            for stream in streams.values():
                stream.close()
        return {name: streams[name].answer(pieces[name]) for name in settings}
