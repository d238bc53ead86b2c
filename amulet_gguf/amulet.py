"""The face for Python: load a model, then stream, generate or compare answers."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from amulet_gguf.declaration import check_callable, whole
from amulet_gguf.engine.answer import Answer, Piece
from amulet_gguf.engine.drafter import Drafter, check_vocabulary
from amulet_gguf.engine.drafts import N_OUTPUTS
from amulet_gguf.engine.engine import Engine
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import NoRoomError, SettingError, shown
from amulet_gguf.home.files import read_file
from amulet_gguf.home.text import decoded
from amulet_gguf.llama.checks import check
from amulet_gguf.llama.context import Context, max_sequences
from amulet_gguf.llama.devices import devices, offload
from amulet_gguf.llama.loading import Loading, LoadOptions
from amulet_gguf.llama.memory import DEFAULT_N_CTX, MIN_N_CTX, check_fits
from amulet_gguf.llama.model import Model, can_offload
from amulet_gguf.models.find import find_model
from amulet_gguf.models.trial import is_known, try_out
from amulet_gguf.prompts.messages import Message
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.sandbox import MAX_TEMPLATE
from amulet_gguf.prompts.tools import Tools
from amulet_gguf.settings import Options, Settings, as_settings
from amulet_gguf.stream import Job, JobOptions, OnPrefill, Plan, Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack


logger = logging.getLogger(__name__)


def load_model(
    loading: Loading,
    *,
    n_sequences: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Model:
    """Load a model after a look at the memory that it will take: the one door for all of them.

    If nobody says how many, as many layers go to the GPU as fit there beside the context.

    Args:
        n_sequences: of the context that will be made. None: its size is not known yet, and room for the
            smallest is enough.
        progress: called with the fraction loaded, from 0 to 1.

    Raises:
        As `Amulet.load`.
    """
    file = find_model(loading.model)
    is_new = not loading.trust_model and not is_known(file)
    if is_new:
        check(file)  # first: what follows believes what the file says
    if n_sequences is None:
        loading, n_sequences = dataclasses.replace(loading, n_ctx=MIN_N_CTX), 1
    n_fit = None
    if loading.n_gpu_layers is None and loading.rpc is None and can_offload():
        n_fit = offload(
            file, loading.n_ctx, n_sequences, devices(), loading.n_batch, loading.cache_type
        ).n_layers
    n_layers = loading.n_gpu_layers if n_fit is None else n_fit
    if loading.rpc is None and (n_layers == 0 or not can_offload()):
        check_fits(file, loading.n_ctx, n_sequences, loading.n_batch, loading.cache_type)
    if is_new and loading.rpc is None:
        try_out(file, n_layers, progress)
    template = None if loading.chat_template is None else _read(loading.chat_template)

    def load(n_layers: int | None) -> Model:
        return Model(
            file,
            n_gpu_layers=n_layers,
            cache_type=loading.cache_type,
            rpc=loading.rpc,
            chat_template=template,
            progress=progress,
        )

    def load_beside_context(n_layers: int) -> Model:
        if n_layers == 0:
            check_fits(file, loading.n_ctx, n_sequences, loading.n_batch, loading.cache_type)
        model = load(n_layers)
        try:
            _context(model, loading, n_sequences).close()
        except BaseException:
            model.close()
            raise
        return model

    return load(n_layers) if n_fit is None else _halving(load_beside_context, n_fit)


def _halving(load: Callable[[int], Model], n_layers: int) -> Model:
    """Load a model with layers on the GPU, half as many for as long as llama.cpp finds no room."""
    try:
        return load(n_layers)
    except NoRoomError as error:
        if n_layers == 0:
            raise
        # As a text: who keeps the error keeps what could not be loaded.
        logger.warning("%s; now with %d layers on the GPU", str(error), n_layers // 2)
    return _halving(load, n_layers // 2)


def _context(model: Model, loading: Loading, n_sequences: int) -> Context:
    return Context(
        model,
        n_ctx=loading.n_ctx or min(DEFAULT_N_CTX, model.n_ctx_train or DEFAULT_N_CTX),
        n_sequences=n_sequences,
        n_batch=loading.n_batch,
        n_threads=loading.n_threads,
        n_outputs=max(n_sequences, min(loading.n_batch or N_OUTPUTS, N_OUTPUTS)),
    )


def _read(path: str | os.PathLike[str]) -> str:
    """Return a chat template.

    Raises:
        SettingError: it cannot be read.
    """
    name = f"the chat template {shown(os.fspath(path))}"
    try:
        text = decoded(read_file(path, 4 * MAX_TEMPLATE))
    except OSError as error:
        raise SettingError(f"{name} cannot be read: {error.strerror}", "chat_template") from None
    except UnicodeError:
        raise SettingError(f"{name} is not text in UTF-8: save it as such", "chat_template") from None
    if not text.strip():
        raise SettingError(f"{name} is empty", "chat_template")
    return text


def _drafter(model: Model, loading: Loading, n_ctx: int) -> Drafter:
    """Load the draft model."""
    small = dataclasses.replace(  # its one sequence takes little, and what it is for is speed
        loading, model=loading.draft_model, n_ctx=n_ctx, cache_type="f16", rpc=None, chat_template=None
    )
    with contextlib.ExitStack() as failed:
        drafting = failed.enter_context(load_model(small, n_sequences=1))
        check_vocabulary(drafting, model)
        context = Context(
            drafting,
            n_ctx=n_ctx,
            n_sequences=1,
            n_batch=loading.n_batch,
            n_threads=loading.n_threads,
        )
        drafter = Drafter(failed.enter_context(context), min(drafting.n_vocab, model.n_vocab))
        if not context.can_draft:
            raise SettingError(
                f"{drafting.path.name} cannot take tokens back, so that it cannot draft: choose a model "
                "without recurrent layers and sliding windows",
                "draft_model",
            )
        failed.pop_all()
    return drafter


class Amulet:
    """A loaded model that answers, realigned to preferences. Make one with `Amulet.load`.

    Pieces are written as they are taken, all of them by one thread: see `Engine`. To ask from several
    threads, or from asyncio, use `AmuletService`.
    """

    def __init__(self, model: Model, engine: Engine, drafter: Drafter | None = None) -> None:
        self.model = model
        self.engine = engine
        self.planner = Planner(model, drafter)
        self._drafter = drafter

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        n_sequences: int = 2,
        progress: Callable[[float], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> Amulet:
        """Load a model.

        Args:
            path: a GGUF file, or the name of an installed model; `amulet_gguf.models.find_model` says
                which names there are, and what None stands for.
            n_sequences: memory to begin with, in branches that can run at once: a generation takes one
                for the base and one per preference. It grows when more are asked for.
            progress: called with the fraction loaded, from 0 to 1.
            **options: fields of `amulet_gguf.llama.loading.Loading`: n_ctx, n_gpu_layers, n_threads, …

        Raises:
            ModelNotFoundError, ModelFormatError: the file is missing or cannot be used.
            ConfigError: the default model is asked for, and the configuration has a mistake.
            SettingError: a number out of range, a cache type that the model cannot have, rpc not
                possible, a draft model of another vocabulary.
            EngineError: not enough memory (see `amulet_gguf.llama.memory.check_fits`), or an RPC server
                cannot be reached.
        """
        loading = Loading(model=path, **options)
        n_sequences = whole("n_sequences", n_sequences, 1, max_sequences())
        check_callable("progress", progress)
        model = load_model(loading, n_sequences=n_sequences, progress=progress)
        try:
            return cls.of(model, loading, n_sequences)
        except BaseException:
            model.close()
            raise

    @classmethod
    def of(cls, model: Model, loading: Loading, n_sequences: int) -> Amulet:
        """Run a model that is loaded, and close it in the end; arguments and errors as `load`."""
        with contextlib.ExitStack() as failed:
            engine = Engine(model, lambda n: _context(model, loading, n), n_sequences)
            failed.callback(engine.close)
            drafter = None
            if loading.draft_model is not None:  # after the context, so that it takes what room is left
                drafter = _drafter(model, loading, engine.n_ctx)
                failed.callback(drafter.close)
            amulet = cls(model, engine, drafter)
            failed.pop_all()
        return amulet

    def __enter__(self) -> Amulet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs, after the step under way, and free all memory; from any thread.

        What others do with the model meanwhile ends with ClosedError.
        """
        self.engine.close()
        if self._drafter is not None:
            self._drafter.close()
        self.model.close()

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        settings: Settings | None = None,
        draft: str | None = None,
        tools: Tools | None = None,
        on_prefill: OnPrefill | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Answer a prompt piece by piece.

        Args:
            prompt: the user's message.
            messages: a conversation instead: mappings with "role" (system, user, assistant) and
                "content", the last of the user.
            settings: where to start from; None means the defaults.
            draft: an answer that this one may be much like, such as one written with another strength:
                as far as it is, several tokens come in the time of one. What is written does not depend
                on it (but for rounding, where two tokens are nearly as probable).
            tools: functions that the answer may call: see `Answer.calls`.
            on_prefill: called with the tokens of the prompt read so far and in all, as they are read.
            **options: fields of `Settings` that differ.

        Raises:
            SettingError, PromptError: at once, before anything is decoded. `PromptTooLongError` gives
                the counts.
            EngineError: from the iterator, if llama.cpp fails.
        """

        def plan(planner: Planner, settings: Settings) -> Request:
            return planner.request(prompt, messages, settings, draft=draft, tools=tools)

        settings = as_settings(settings).replace(**options)
        return self.start(plan, settings, on_prefill=on_prefill)

    def start(self, plan: Plan, settings: Settings, **options: Unpack[JobOptions]) -> Stream:
        """Begin an answer that needs more than `stream` says: its request is what `plan` makes.

        Raises:
            As `stream`.
        """
        settings = self.planner.resolve(settings)
        job = Job(settings, **options)
        job.generation = self.engine.submit(plan(self.planner, settings))
        return Stream(job, self.engine, self.planner)

    def wait_ready(self, timeout: float | None = None) -> Amulet:
        """Return itself, which is ready, as an `AmuletService` is when it has waited."""
        return self

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        settings: Settings | None = None,
        draft: str | None = None,
        tools: Tools | None = None,
        **options: Unpack[Options],
    ) -> Answer:
        """Answer a prompt; arguments and errors as `stream`."""
        settings = as_settings(settings).replace(**options)
        with self.stream(
            prompt, messages=messages, settings=settings, draft=draft, tools=tools
        ) as stream:
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
            prompt, messages: as in `stream`. What is cached of a conversation is reused.
            settings: by a name of your choice.
            on_piece: called with that name and each piece as it is written.

        Raises:
            As `stream`.
        """

        if not isinstance(settings, Mapping):
            raise SettingError(f"expected settings by name, got {shown(settings)}", "settings")
        check_callable("on_piece", on_piece)

        def planned(each: Settings) -> Request:
            return self.planner.request(prompt, messages, each, reuse=messages is not None)

        requests = {name: planned(each) for name, each in settings.items()}
        self.engine.reserve(sum(len(request.branches) for request in requests.values()))
        with contextlib.ExitStack() as stack:
            streams = {
                name: stack.enter_context(
                    self.start(lambda *_: request, settings[name])  # noqa: B023
                )
                for name, request in requests.items()
            }
            running = dict(streams)
            while running:
                for name, stream in list(running.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del running[name]
                    elif on_piece is not None:
                        on_piece(name, piece)
        return {name: stream.answer() for name, stream in streams.items()}
