"""A model on a thread of its own, for programs that must not wait for it: windows, servers, asyncio.

The engine's thread loads the model, makes every step, and frees it all in the end. A second thread turns
prompts into requests, so that a long prompt holds up nobody's answer. Callers put what they want into
queues, and are woken when their generation has something new.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from amulet_gguf.amulet import Amulet
from amulet_gguf.declaration import check_callable, whole
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import AmuletError, QueueFullError
from amulet_gguf.llama.handle import closed, forget_in_child
from amulet_gguf.llama.loading import LoadOptions
from amulet_gguf.prompts.messages import Message
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.prompts.tools import Tools
from amulet_gguf.service.look import Look, settle
from amulet_gguf.service.stream import ServiceJob, ServiceStream
from amulet_gguf.settings import Options, Settings, as_settings
from amulet_gguf.stream import Action, JobOptions, OnPrefill, Plan

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")
logger = logging.getLogger(__name__)


class AmuletService:
    """A model that answers any number of threads and tasks, none of which it makes wait.

    Close it, or use `with` or `async with`: its threads and memory are held until then, or until the
    interpreter ends.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        n_sequences: int = 2,
        max_waiting: int = 256,
        on_load: Callable[[float], None] | None = None,
        **options: Unpack[LoadOptions],
    ) -> None:
        """Begin to load a model, and return at once.

        Args:
            path: a file or name, as in `Amulet.load`.
            n_sequences: how many branches, one for the base and one for each preference of each answer,
                can be written at once.
            max_waiting: answers that may wait for their turn.
            on_load: called on the engine's thread with the fraction loaded, from 0 to 1; if it raises,
                the model is not loaded.
            **options: fields of `amulet_gguf.llama.loading.Loading`.
        """
        check_callable("on_load", on_load)
        self._on_load = on_load
        self._max_waiting = whole("max_waiting", max_waiting, 0, 2**63 - 1)
        self._amulet: Amulet | None = None
        self._failure: BaseException | None = None
        self._lock = threading.RLock()  # of those who ask; its own threads never wait for them
        self._jobs: set[ServiceJob] = set()  # not finished, or not yet known to be
        self._running: list[ServiceJob] = []  # of the engine; only its thread looks at it
        self._works: dict[Future[Any], Generator[object, None, Any] | None] = {}  # None: not begun
        self._is_closing = False
        self._is_ready = threading.Event()  # loaded, or never will be
        # The only queues whose `put` is safe in `__del__`, which may run in the middle of anything.
        self._unplanned: queue.SimpleQueue[ServiceJob | Look[Any] | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[Callable[[Amulet], None]] = queue.SimpleQueue()
        self._planner = threading.Thread(target=self._plan, name="amulet-planner", daemon=True)
        self._engine = threading.Thread(
            target=self._run, args=(path, n_sequences, options), name="amulet-engine", daemon=True
        )
        # Daemons, because a program's end waits for other threads before it calls this.
        atexit.register(self.close)
        forget_in_child(self)
        self._planner.start()
        self._engine.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End what runs, free the model, and wait for both threads, at most for a step.

        Answers that are not finished fail with ClosedError. It may be called from anywhere, and again.
        """
        self._is_closing = True
        atexit.unregister(self.close)
        self._commands.put(lambda amulet: None)
        is_own = threading.current_thread() in (self._engine, self._planner)  # called by a callback
        # A signal's handler may be, in the middle of something that the engine's thread has to wait for.
        is_awaited = any(job.lock._is_owned() for job in list(self._jobs))  # type: ignore[attr-defined]
        if not is_own and not is_awaited:
            self._engine.join()

    def forget(self) -> None:
        """See `amulet_gguf.llama.handle.Forgetful`."""
        self._lock = threading.RLock()
        self._is_closing = True
        for job in self._jobs:
            job.forget(self._closed())
        for future in self._works:
            settle(future, error=self._closed())

    def wait_ready(self, timeout: float | None = None) -> Amulet:
        """Wait until the model is loaded; return it, to be looked at only.

        Raises:
            AmuletError: it could not be loaded.
            TimeoutError: it took more than so many seconds.
        """
        if not (self._is_closing or self._is_ready.wait(timeout)):
            raise TimeoutError(f"the model was not loaded in {timeout} seconds")
        if self._amulet is None or self._is_closing:
            raise self._failure or self._closed()
        return self._amulet

    @property
    def is_closed(self) -> bool:
        """Nothing more can be asked for: it was closed, or cannot go on."""
        return self._is_closing

    @property
    def n_live(self) -> int:
        """Answers that hold sequences now."""
        return 0 if self._amulet is None else self._amulet.engine.n_live

    @property
    def n_waiting(self) -> int:
        """Answers that wait for their turn."""
        return max(0, len(self._jobs) - self.n_live)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        text: str | Sequence[int] | None = None,
        settings: Settings | None = None,
        is_adjustable: bool = True,
        n_alternatives: int = 0,
        draft: str | None = None,
        tools: Tools | None = None,
        on_prefill: OnPrefill | None = None,
        **options: Unpack[Options],
    ) -> ServiceStream:
        """Ask for an answer, and return at once, even while the model is being loaded.

        What is cached of a conversation from answers before is not read again.

        Args:
            prompt, messages, text: exactly one of them: see `Amulet.stream` and `Planner.request`.
            settings: where to start from; None means the defaults.
            is_adjustable: `adjust` may be used, at the price of memory for all branches.
            n_alternatives: explain each token with so many of each distribution's best.
            draft, tools: as in `Amulet.stream`.
            on_prefill: called on the engine's thread with the tokens of the prompt read so far and in
                all; it must return soon. If it raises, the answer fails with that.
            **options: fields of `Settings` that differ.

        Raises:
            SettingError, QueueFullError, ClosedError: at once.
            AmuletError: from the iterator, for everything else.
        """
        settings = as_settings(settings).replace(**options)

        def plan(planner: Planner, settings: Settings) -> Request:
            return planner.request(
                prompt,
                messages,
                settings,
                text=text,
                reuse=messages is not None,
                is_adjustable=is_adjustable,
                n_alternatives=n_alternatives,
                draft=draft,
                tools=tools,
            )

        return self.start(plan, settings, is_adjustable=is_adjustable, on_prefill=on_prefill)

    def start(self, plan: Plan, settings: Settings, **options: Unpack[JobOptions]) -> ServiceStream:
        """Ask for an answer that needs more than `stream` says: its request is what `plan` makes.

        Raises:
            As `stream`.
        """
        job = ServiceJob(plan, settings, **options)
        with self._lock:
            if self.n_waiting >= self._max_waiting:
                raise QueueFullError(self._max_waiting)
            self._jobs.add(job)
        if self._is_closing:  # asked last: it is in `_jobs`, for `_end` to see, or this sees the end
            self._jobs.discard(job)
            raise self._closed()
        self._unplanned.put(job)
        return ServiceStream(job, self._do)

    def look(self, make: Callable[[Amulet], T]) -> Future[T]:
        """Ask something of the vocabulary or the chat template, on the thread that plans answers.

        Raises:
            QueueFullError, ClosedError: at once, or the latter from the future.
        """
        look = Look(make)
        with self._lock:
            if not self._is_closing and self._unplanned.qsize() >= self._max_waiting:
                raise QueueFullError(self._max_waiting)
            self._unplanned.put(look)
        if self._is_closing:  # asked last, as in `start`: nobody may see it
            raise self._closed()
        return look.future

    def work(self, make: Callable[[Amulet], Generator[object, None, T]]) -> Future[T]:
        """Do something else with the model on the engine's thread: it must not wait for long work.

        Args:
            make: a generator's function, called there. It yields wherever answers may have their turn,
                and returns the result. Cancelling the future closes it at its next turn.

        Raises:
            ClosedError: at once, or from the future.
        """
        future: Future[T] = Future()
        self._works[future] = None
        if self._is_closing:  # asked last, as in `start`
            raise self._closed()
        self._commands.put(partial(self._begin_work, make, future))
        return future

    def _begin_work(
        self, make: Callable[[Amulet], Generator[object, None, T]], future: Future[T], amulet: Amulet
    ) -> None:
        self._works[future] = work = make(amulet)
        self._go_on(future, work, amulet)

    def _go_on(self, future: Future[T], work: Generator[object, None, T], _amulet: Amulet) -> None:
        try:
            if not future.cancelled():
                next(work)
                self._commands.put(partial(self._go_on, future, work))
                return
            work.close()
        except StopIteration as done:
            settle(future, done.value)
        except Exception as error:
            settle(future, error=error)
        del self._works[future]

    def _do(self, action: Action) -> None:
        """Do something on the engine's thread, between two steps."""
        self._commands.put(lambda amulet: action(amulet.engine, amulet.planner))

    def _closed(self) -> BaseException:
        why = f": {self._failure}" if self._failure is not None else ""
        return closed(f"the service is closed{why}")

    def _plan(self) -> None:
        """Be the planner's thread."""
        self._is_ready.wait()
        while (job := self._unplanned.get()) is not None:
            if isinstance(job, Look):
                job.settle(None if self._is_closing else self._amulet, self._closed())
                continue
            if self._is_closing or self._amulet is None:
                continue  # `_end` fails them all
            if job.is_cancelled:
                self._forget(job)
                continue
            try:
                with job.lock:
                    settings = job.settings = self._amulet.planner.resolve(job.settings)
                request = job.plan(self._amulet.planner, settings)
            except BaseException as error:
                self._commands.put(partial(self._refuse, job, error))
            else:
                self._commands.put(partial(self._submit, job, request, settings))

    def _run(self, path: str | os.PathLike[str] | None, n_sequences: int, options: LoadOptions) -> None:
        """Be the engine's thread."""
        try:
            self._amulet = Amulet.load(
                path, n_sequences=n_sequences, progress=self._on_progress, **options
            )
            self._is_ready.set()
            while not self._is_closing:
                self._obey(self._amulet)
                if self._running:
                    self._step(self._amulet)
        except BaseException as error:
            if not self._is_closing:
                self._failure = error
                if not isinstance(error, AmuletError):
                    logger.error("the engine's thread ended: %r", error)
        finally:
            self._end()

    def _end(self) -> None:
        self._is_closing = True
        self._is_ready.set()
        self._unplanned.put(None)
        self._planner.join()  # it may be in the middle of using the model
        for future, work in list(self._works.items()):
            if work is not None:
                work.close()
            settle(future, error=self._closed())
        self._works.clear()
        if self._amulet is not None:
            self._amulet.close()
        for job in list(self._jobs):
            job.fail(self._failure if isinstance(self._failure, AmuletError) else self._closed())
        self._jobs.clear()
        self._running.clear()

    def _on_progress(self, fraction: float) -> None:
        if self._is_closing:
            raise self._closed()
        if self._on_load is not None:
            self._on_load(fraction)

    def _obey(self, amulet: Amulet) -> None:
        """Do what was asked for since the last step; wait for something if there is nothing to do."""
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=not self._running)(amulet)
            for _ in range(self._commands.qsize()):  # what comes of these waits for a step
                self._commands.get_nowait()(amulet)

    def _submit(self, job: ServiceJob, request: Request, planned: Settings, amulet: Amulet) -> None:
        if self._is_closing:
            return  # `_end` fails it
        if job.is_cancelled:
            self._forget(job)
            return
        try:
            generation = amulet.engine.submit(request)
        except Exception as error:  # what a caller's plan returned may be anything
            self._refuse(job, error, amulet)
            return
        self._running.append(job)
        job.begin(generation)
        if job.settings is not planned:
            job.remix(amulet.engine, amulet.planner)
        if job.is_cancelled:  # since the question above
            job.cancel(amulet.engine, amulet.planner)

    def _refuse(self, job: ServiceJob, error: BaseException, _amulet: Amulet) -> None:
        job.fail(error)
        self._forget(job)

    def _forget(self, job: ServiceJob) -> None:
        self._jobs.discard(job)

    def _step(self, amulet: Amulet) -> None:
        try:
            amulet.engine.step()
        except Exception:
            # The engine has ended what was live, and can go on; if it has not, it never would.
            if not any(job.is_finished for job in self._running):
                raise
            logger.exception("a step failed")
        for job in self._running:
            self._tell(job, amulet)
        self._running = [job for job in self._running if not job.is_finished]

    def _tell(self, job: ServiceJob, amulet: Amulet) -> None:
        generation = job.generation
        assert generation is not None
        try:
            job.tell_prefill()
        except BaseException as error:  # a callback's failure is its answer's, whatever it raises
            generation.fail(error)
            amulet.engine.cancel(generation)
        if generation.is_finished:
            self._forget(job)
        if job.has_more:
            job.notify()
