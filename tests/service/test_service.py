"""A model on a thread of its own: who may do what when, and what is left when it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fixture_types import Tiny
from serving import is_free, until

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.answer import Piece
from amulet_gguf.engine.request import Request
from amulet_gguf.errors import (
    AmuletError,
    ClosedError,
    EngineError,
    ModelFormatError,
    PromptError,
    PromptTooLongError,
    QueueFullError,
    SettingError,
)
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.service.service import AmuletService
from amulet_gguf.service.stream import ServiceStream
from amulet_gguf.settings import Settings

LONG = 100_000  # tokens: as many as the context takes
Service = Callable[..., AmuletService]


@pytest.fixture
def service(tiny: Tiny) -> Iterator[Service]:
    """Make services on the tiny model; closed in the end, with no thread left."""
    before = set(threading.enumerate())
    made: list[AmuletService] = []

    def make(path: Path | None = None, **options: Any) -> AmuletService:
        options = {"n_ctx": 512, "n_threads": 1, "n_sequences": 4, **options}
        made.append(AmuletService(path or tiny("llama"), **options))
        return made[-1]

    yield make
    for gate in Gate.all:
        gate.allow(LONG)
    Gate.all.clear()
    for each in made:
        each.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # one that ends already takes a moment
    assert set(threading.enumerate()) == before


@pytest.fixture
def alone(tiny: Tiny) -> Iterator[Amulet]:
    """The same model without a service."""
    with Amulet.load(tiny("llama"), n_ctx=512, n_threads=1, n_sequences=4) as amulet:
        yield amulet


class Gate:
    """Lets an engine make steps one by one."""

    all: ClassVar[list[Gate]] = []

    def __init__(self, service: AmuletService) -> None:
        engine = service.wait_ready().engine
        self._steps = threading.Semaphore(0)
        self.is_waiting = threading.Event()
        step = engine.step

        def gated() -> bool:
            self.is_waiting.set()
            self._steps.acquire()
            self.is_waiting.clear()
            return step()

        engine.step = gated  # type: ignore[method-assign]
        self.all.append(self)

    def allow(self, n: int = 1) -> None:
        self._steps.release(n)

    def allow_until(self, condition: Callable[[], bool]) -> None:
        def is_met() -> bool:
            self.allow()
            return condition()

        until(is_met)


def test_answers_are_those_of_the_model_alone(service: Service, alone: Amulet) -> None:
    settings = Settings(prefer="concise", strength=4, max_tokens=30, temperature=0.8, seed=5)
    expected = alone.generate("How are you?", settings=settings)
    with service() as running:
        answer = running.stream("How are you?", settings=settings).answer()
        pieces = list(running.stream("How are you?", settings=settings))
    assert answer.text == expected.text == "".join(piece.text for piece in pieces)
    assert answer.finish_reason == expected.finish_reason == pieces[-1].finish_reason
    assert answer.usage == expected.usage
    assert answer.timings.decode > 0


def test_threads_and_tasks_share_it(service: Service) -> None:
    running = service(n_sequences=8)
    options: dict[str, Any] = {"prefer": "concise", "max_tokens": 25, "temperature": 0.9}
    asked = [f"Say {i}" for i in range(12)]
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        found[prompt] = running.stream(prompt, seed=len(prompt), **options).answer().text

    async def ask_all() -> list[str]:
        streams = [running.stream(prompt, seed=len(prompt), **options) for prompt in asked]
        return [each.text for each in await asyncio.gather(*(s.answer_async() for s in streams))]

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in asked]
    for thread in threads:
        thread.start()
    from_tasks = asyncio.run(ask_all())
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert [bool(text) for text in from_tasks] == [True] * 12
    assert is_free(running)


def test_a_text_is_gone_on_with(service: Service, alone: Amulet) -> None:
    request = alone.planner.request(None, None, Settings(max_tokens=12), text="Once upon a time")
    expected = list(alone.engine.stream(alone.engine.submit(request)))
    stream = service().stream(text="Once upon a time", max_tokens=12)
    assert [piece.token for piece in stream] == [piece.token for piece in expected]


def test_tokens_are_gone_on_with_as_they_are(service: Service) -> None:
    running = service()
    model = running.wait_ready().model
    tokens = [model.bos, *model.tokenize("Once upon").tolist()]
    answer = running.stream(text=tokens, max_tokens=8).answer()
    assert answer.text == running.stream(text="Once upon", max_tokens=8).answer().text
    assert answer.usage.prompt_tokens == len(tokens)
    assert running.stream(text=tokens[1:], max_tokens=8).answer().usage.prompt_tokens == len(tokens) - 1
    for wrong in ([], [model.n_vocab], [-1], [10**30]):
        with pytest.raises(PromptError):
            running.stream(text=wrong).answer()


def test_asking_does_not_wait_for_the_model(service: Service) -> None:
    may_load = threading.Event()
    fractions: list[float] = []

    def on_load(fraction: float) -> None:
        assert threading.current_thread() is not threading.main_thread()
        may_load.wait()
        fractions.append(fraction)

    running = service(on_load=on_load)
    streams = [running.stream(f"Say {i}", max_tokens=4) for i in range(3)]
    with pytest.raises(TimeoutError):
        running.wait_ready(0.01)
    assert not any(stream.is_finished for stream in streams)
    may_load.set()
    assert all(stream.answer().text for stream in streams)
    assert fractions[-1] == 1
    assert fractions == sorted(fractions)


def test_a_load_that_fails_reaches_all_who_wait(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"GGUF but not really")
    may_load = threading.Event()
    load = Amulet.load

    def late(*arguments: Any, **options: Any) -> Amulet:
        may_load.wait()
        return load(*arguments, **options)

    monkeypatch.setattr(Amulet, "load", late)
    running = service(path)
    streams = [running.stream("x") for _ in range(3)]
    may_load.set()
    for stream in streams:
        with pytest.raises(ModelFormatError, match=r"not\.gguf"):
            stream.answer()
    with pytest.raises(ModelFormatError):
        running.wait_ready()
    with pytest.raises(ClosedError, match=r"not\.gguf"):
        running.stream("x")


def test_a_callback_that_raises_stops_the_loading(service: Service) -> None:
    def refuse(_: float) -> None:
        raise RuntimeError("no thanks")

    with pytest.raises(RuntimeError, match="no thanks"):
        service(on_load=refuse).wait_ready()


def test_settings_are_refused_at_once_and_prompts_from_the_iterator(service: Service) -> None:
    running = service()
    with pytest.raises(SettingError):
        running.stream("x", strength=1e9)
    with pytest.raises(SettingError, match="did you mean 'verbose'"):
        running.stream("x", avoid="verbos")  # before a thread stumbles over it
    for bad, error in (("", PromptError), ("word " * 2000, PromptTooLongError)):
        with pytest.raises(error):
            running.stream(bad).answer()
        with pytest.raises(error):
            asyncio.run(running.stream(bad).answer_async())
        with pytest.raises(error):
            asyncio.run(running.stream(bad).accepted())
    assert running.stream("x", max_tokens=3).answer().text
    assert is_free(running)


@pytest.mark.parametrize("how", ["cancel", "with", "drop", "task"])
def test_cancelling_frees_the_sequences(service: Service, how: str) -> None:
    running = service()
    if how == "task":

        async def take_some() -> None:
            async for _ in running.stream("x", max_tokens=LONG):
                if running.n_live:
                    await asyncio.sleep(3600)

        async def abandon() -> None:
            task = asyncio.create_task(take_some())
            while not running.n_live:
                await asyncio.sleep(0.001)
            task.cancel()

        asyncio.run(abandon())
    else:
        stream = running.stream("x", max_tokens=LONG, stop="\0never")
        next(stream)
        if how == "cancel":
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
            assert list(stream)[-1].finish_reason == "cancelled"
            stream.cancel()  # again
        elif how == "with":
            with stream:
                pass
        del stream
    gc.collect()
    until(lambda: is_free(running))


def test_a_cancelled_answer_ends_within_a_step(service: Service) -> None:
    running = service()
    gate = Gate(running)
    stream = running.stream("x", max_tokens=LONG)
    gate.allow()
    next(stream)
    gate.is_waiting.wait()  # in a step
    stream.cancel()
    gate.allow()  # this one ends
    *some, last = list(stream)
    assert last.finish_reason == "cancelled"
    assert len(some) <= 1
    gate.allow(LONG)
    until(lambda: is_free(running))


def test_what_is_cancelled_early_ends_at_once(service: Service) -> None:
    may_load = threading.Event()
    running = service(on_load=lambda _: may_load.wait())
    streams = [running.stream("x") for _ in range(2)]
    for stream in streams:
        stream.cancel()
        stream.cancel()
    assert [piece.finish_reason for piece in streams[0]] == ["cancelled"]
    assert asyncio.run(streams[1].answer_async()).finish_reason == "cancelled"
    may_load.set()
    running.wait_ready()
    until(lambda: is_free(running))


def test_one_that_waits_for_sequences_can_be_cancelled(service: Service) -> None:
    running = service(n_sequences=2)
    first = running.stream("x", prefer="concise", max_tokens=LONG)
    next(first)
    second = running.stream("y", prefer="concise")
    asyncio.run(second.accepted())
    assert running.n_waiting == 1
    second.cancel()
    assert second.answer().finish_reason == "cancelled"
    assert not first.is_finished
    first.cancel()
    until(lambda: is_free(running))


def test_a_strength_changed_before_the_first_token_is_as_if_asked_for(
    service: Service, alone: Amulet
) -> None:
    def expected(settings: Settings) -> list[int | None]:
        request = alone.planner.request("How are you?", None, settings, is_adjustable=True)
        return [piece.token for piece in alone.engine.stream(alone.engine.submit(request))]

    weak = Settings(prefer=["concise", "formal"], strength=0, max_tokens=30, repeat_penalty=1)
    strong = Settings(
        prefer=[("concise", 2.0), ("formal", -1.0)], strength=6, max_tokens=30, repeat_penalty=1
    )
    assert expected(weak) != expected(strong)
    streams: list[ServiceStream] = []
    begun = threading.Event()

    def on_prefill(done: int, total: int) -> None:
        begun.wait()
        if done < total:
            streams[0].adjust(strength=6, weights=[2, -1])

    # A batch of 8 reads the prompt in several steps.
    running = service(n_batch=8)
    streams.append(running.stream("How are you?", settings=weak, on_prefill=on_prefill))
    begun.set()
    assert [piece.token for piece in streams[0]] == expected(strong)
    assert streams[0].settings == alone.planner.resolve(strong)

    may_load = threading.Event()
    running = service(on_load=lambda _: may_load.wait())
    early = running.stream("How are you?", settings=weak)
    early.adjust(strength=6, weights=[2, -1])
    may_load.set()
    assert [piece.token for piece in early] == expected(strong)


def test_a_strength_applies_from_the_next_token_on(service: Service, alone: Amulet) -> None:
    settings = Settings(prefer="concise", strength=0, max_tokens=20, repeat_penalty=1)

    def switched(at: int) -> list[Piece]:
        request = alone.planner.request("How are you?", None, settings, is_adjustable=True)
        generation = alone.engine.submit(request)
        pieces = []
        for piece in alone.engine.stream(generation):
            pieces.append(piece)
            if len(pieces) == at:
                strong = Settings(prefer="concise", strength=9, max_tokens=20, repeat_penalty=1)
                generation.mixture = alone.planner.mixture(strong)
        return pieces

    running = service()
    gate = Gate(running)
    stream = running.stream("How are you?", settings=settings)
    gate.allow(4)  # one for the prompt
    taken = [next(stream) for _ in range(4)]
    gate.is_waiting.wait()  # the step that makes the fifth token may have begun
    thread = threading.Thread(target=stream.adjust, args=(9,))
    thread.start()
    thread.join()
    gate.allow(LONG)
    tokens = [piece.token for piece in [*taken, *stream]]
    assert tokens == [piece.token for piece in switched(5)]
    assert tokens != [piece.token for piece in switched(100)]


def test_what_cannot_be_adjusted_says_so(service: Service) -> None:
    running = service()
    stream = running.stream("x", prefer="concise", is_adjustable=False, max_tokens=3)
    with pytest.raises(SettingError, match="is_adjustable"):
        stream.adjust(3)
    with running.stream("x", prefer="concise", max_tokens=LONG) as stream:
        for bad in ({"weights": [1, 2]}, {"weights": [99]}, {"strength": float("nan")}):
            with pytest.raises(SettingError):
                stream.adjust(**bad)
        assert stream.settings.strength == Settings().strength
        stream.adjust(weights=[0.5])
        assert stream.settings.prefer[0].weight == 0.5
    until(lambda: is_free(running))


def test_reading_a_prompt_is_reported_and_its_callback_fails_alone(service: Service) -> None:
    running = service(n_batch=16)
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        assert threading.current_thread().name == "amulet-engine"
        seen.append((done, total))

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("window is gone")

    good = running.stream("word " * 50, on_prefill=note, max_tokens=5)
    bad = running.stream("word " * 50, on_prefill=refuse, max_tokens=5)
    with pytest.raises(RuntimeError, match="window is gone"):
        bad.answer()
    answer = good.answer()
    assert answer.usage.completion_tokens == 5
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert {total for _, total in seen} == {answer.usage.prefill_tokens}
    until(lambda: is_free(running))


@pytest.mark.parametrize("error", [EngineError("decode failed"), MemoryError(), ZeroDivisionError()])
def test_a_step_that_fails_ends_what_ran_and_nothing_else(
    service: Service, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = service(n_sequences=4)
    gate = Gate(running)
    context = running.wait_ready().engine._sequences.context
    live = [running.stream("x", prefer="concise", max_tokens=LONG) for _ in range(2)]
    gate.allow_until(lambda: all(stream._job.has_more for stream in live))
    waiting = running.stream("y", prefer="concise", max_tokens=5)
    gate.allow_until(lambda: waiting._job.is_accepted)

    def fail() -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(context, "decode", fail)
    gate.allow(LONG)
    for stream in live:
        with pytest.raises(EngineError):
            list(stream)
    assert waiting.answer().text
    assert running.stream("z", max_tokens=3).answer().text
    until(lambda: is_free(running))


def test_an_engine_that_cannot_go_on_closes_the_service(service: Service) -> None:
    running = service()
    engine = running.wait_ready().engine

    def broken() -> bool:
        raise RuntimeError("no more")

    engine.step = broken  # type: ignore[method-assign]
    streams = [running.stream("x") for _ in range(3)]
    for stream in streams:
        with pytest.raises(ClosedError):
            stream.answer()
    with pytest.raises(ClosedError, match="no more"):
        running.stream("x")


def test_a_full_queue_refuses_and_disturbs_nobody(service: Service) -> None:
    running = service(n_sequences=1, max_waiting=2)
    first = running.stream("x", max_tokens=LONG)
    next(first)
    others = [running.stream("y", max_tokens=3) for _ in range(2)]
    with pytest.raises(QueueFullError):
        running.stream("z")
    assert not first.is_finished
    first.cancel()
    assert all(other.answer().text for other in others)
    until(lambda: is_free(running))
    assert running.stream("z", max_tokens=3).answer().text


@pytest.mark.parametrize("when", ["loading", "planning", "reading", "writing", "waiting", "idle"])
def test_closing_ends_everything(service: Service, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    is_there, go_on = threading.Event(), threading.Event()

    def hold(*_: object, **__: object) -> None:
        is_there.set()
        go_on.wait()

    running = service(n_batch=8, on_load=hold if when == "loading" else None)
    streams: list[ServiceStream] = []
    if when == "idle":
        running.wait_ready()
        is_there.set()
    elif when == "planning":
        monkeypatch.setattr(running.wait_ready().planner, "request", hold)
        streams.append(running.stream("x"))
    elif when == "reading":
        streams.append(running.stream("word " * 90, on_prefill=hold))
    else:
        streams.append(running.stream("x", prefer="concise", max_tokens=LONG))
        if when != "loading":
            next(streams[0])
            is_there.set()
        if when == "waiting":
            streams += [running.stream("x", prefer="concise", max_tokens=LONG) for _ in range(5)]
    is_there.wait()
    closing = [threading.Thread(target=running.close) for _ in range(3)]
    for thread in closing:
        thread.start()
    until(lambda: running._is_closing)
    go_on.set()
    for thread in closing:
        thread.join(20)
        assert not thread.is_alive()
    for stream in streams:
        with pytest.raises(ClosedError):
            list(stream)
        stream.cancel()
    with pytest.raises(ClosedError):
        running.stream("x")
    with pytest.raises(ClosedError):
        running.wait_ready()


def test_a_signal_may_close_it_in_the_middle_of_a_call(service: Service) -> None:
    running = service()
    streams = [running.stream("x", max_tokens=LONG) for _ in range(2)]
    next(streams[0])
    with running._lock, streams[1]._job.lock:  # as its handler finds them
        running.close()
    for stream in streams:
        with pytest.raises(ClosedError):
            list(stream)


def test_what_fails_at_the_end_of_an_answer_does_not_hide_why_that_failed(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def refuse(*_: object) -> None:
        raise PromptError("refused")

    def plan(planner: Planner, settings: Settings) -> Request:
        return planner.request("word " * 20, None, settings)

    running = service(n_batch=8)
    with pytest.raises(PromptError):
        running.start(plan, Settings(), on_prefill=refuse, on_end=fail).answer()
    assert [record.exc_info is not None for record in caplog.records] == [True]
    with pytest.raises(ZeroDivisionError):
        running.start(plan, Settings(max_tokens=1), on_end=fail).answer()


def test_closing_wakes_a_thread_and_a_task_that_wait(service: Service) -> None:
    running = service()
    gate = Gate(running)  # nothing will ever come
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            running.stream("x").answer()
        except AmuletError as error:
            errors.append(error)

    async def wait_async() -> None:
        try:
            await running.stream("x").answer_async()
        except AmuletError as error:
            errors.append(error)

    threads = [threading.Thread(target=f) for f in (wait, lambda: asyncio.run(wait_async()))]
    for thread in threads:
        thread.start()
    until(lambda: running.n_waiting == 2)
    closing = threading.Thread(target=running.close)
    closing.start()
    gate.allow(LONG)  # the step that is under way ends
    for thread in (closing, *threads):
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [ClosedError] * 2


def test_a_callback_may_close_it(service: Service) -> None:
    running = service(n_batch=8)
    stream = running.stream("word " * 50, on_prefill=lambda *_: running.close())
    with pytest.raises(ClosedError):
        stream.answer()
    running._engine.join(20)


def test_a_loop_that_is_gone_disturbs_nobody(service: Service) -> None:
    running = service()
    kept: list[ServiceStream] = []

    async def leave() -> None:
        stream = running.stream("x", max_tokens=LONG)
        kept.append(stream)
        await stream.__anext__()
        waiting = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(leave())
    assert running.stream("y", max_tokens=3).answer().text
    assert not kept[0].is_finished
    kept[0].cancel()
    assert list(kept[0])[-1].finish_reason == "cancelled"


@pytest.mark.parametrize(
    "state", ["loading", "writing", "unread", "daemon", "thread", "closed", "error"]
)
def test_an_interpreter_ends_whatever_runs(tiny: Tiny, state: str) -> None:
    code = f"""
import sys, threading, time
from amulet_gguf import AmuletService
state = {state!r}
service = AmuletService({str(tiny("llama"))!r}, n_ctx=8192, n_threads=1,
    on_load=(lambda _: time.sleep(0.01)) if state == "loading" else None)
def run(n=100_000):
    try:
        for piece in service.stream("x", max_tokens=n, repeat_last_n=0): pass
    except Exception as error:
        assert "closed" in str(error), error
if state != "loading":
    service.wait_ready()
    stream = service.stream("x", prefer="concise", max_tokens=100_000)
    if state in ("writing", "closed", "error"): next(stream)
    if state == "daemon":
        threading.Thread(target=run, daemon=True).start(); time.sleep(0.2)
    if state == "thread":
        threading.Thread(target=run, args=(30,)).start()
    if state == "closed": service.close()
    if state == "error": raise SystemExit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == (3 if state == "error" else 0), done.stderr
    assert not done.stderr


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), SystemExit()])
def test_whatever_a_callback_raises_is_its_own_answers_failure(
    service: Service, error: BaseException
) -> None:
    running = service()

    def fail(done: int, total: int) -> None:
        raise error

    bad = running.stream("How are you? " * 20, on_prefill=fail, max_tokens=3)
    with pytest.raises(type(error)):
        bad.answer()
    with pytest.raises(AttributeError):
        running.start(lambda planner, settings: None, Settings()).answer()  # type: ignore[arg-type, return-value]
    assert running.stream("x", max_tokens=3).answer().text


def test_what_was_cancelled_before_it_failed_is_cancelled(service: Service) -> None:
    running = service()
    stream = running.stream("")  # an empty prompt
    stream.cancel()
    assert stream.answer().finish_reason == "cancelled"


def test_tasks_that_gave_up_waiting_leave_nothing_behind(service: Service) -> None:
    running = service()
    release = threading.Event()
    stream = running.stream(
        "How are you? " * 20, on_prefill=lambda done, total: void(release.wait()), max_tokens=3
    )

    async def wait() -> None:
        for _ in range(5):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)

    asyncio.run(wait())
    assert stream._job._waiters == []
    release.set()
    assert stream.answer().text


def void(_: object) -> None: ...


# Other work


def counting(n: int, told: list[int]) -> Callable[[Amulet], Generator[int, None, str]]:
    def count(amulet: Amulet) -> Generator[int, None, str]:
        assert threading.current_thread().name == "amulet-engine"
        try:
            for i in range(n):
                told.append(i)
                yield i
            return f"{amulet.model.n_vocab} words"
        finally:
            told.append(-1)

    return count


def test_work_is_done_on_the_engines_thread_between_steps(service: Service) -> None:
    it = service()
    told: list[int] = []
    with it.stream("What is rain?", max_tokens=LONG, temperature=1.0, seed=3) as stream:
        next(stream)
        before = len(told)
        done = it.work(counting(50, told))
        tokens = [len(told) for _ in range(50) if next(stream, None)]
        assert done.result(30).endswith(" words")
    assert told == [*range(50), -1]
    assert before == 0
    assert len(set(tokens)) > 10  # neither waited for the other to end


def test_work_that_fails_fails_alone(service: Service) -> None:
    it = service()

    def fail(_: Amulet) -> Generator[None, None, None]:
        yield
        raise EngineError("it broke")

    with pytest.raises(EngineError, match="it broke"):
        it.work(fail).result(30)
    assert it.stream("Hi", max_tokens=2).answer().text is not None


def test_work_can_be_cancelled(service: Service) -> None:
    it = service()
    told: list[int] = []
    future = it.work(counting(10**9, told))
    until(lambda: len(told) > 3)
    assert future.cancel()
    until(lambda: told[-1] == -1)
    assert it.stream("Hi", max_tokens=2).answer().finish_reason


@pytest.mark.parametrize("is_begun", [True, False])
def test_closing_ends_work(service: Service, is_begun: bool) -> None:
    it = service()
    told: list[int] = []
    future = it.work(counting(10**9, told))
    if is_begun:
        until(lambda: len(told) > 3)
    it.close()
    with pytest.raises(ClosedError):
        future.result(30)
    assert told == [] or told[-1] == -1
    with pytest.raises(ClosedError):
        it.work(counting(1, told))


def test_work_for_a_model_that_cannot_be_loaded_fails(service: Service, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    it = service(tmp_path / "x.gguf")
    with pytest.raises(ClosedError):
        it.work(counting(1, [])).result(30)


def test_looks_are_taken_on_the_planners_thread(service: Service) -> None:
    running = service()
    tokens = running.look(lambda amulet: amulet.model.tokenize("Hello").tolist())
    name = running.look(lambda amulet: threading.current_thread().name)
    failing = running.look(lambda amulet: 1 // 0)
    assert tokens.result(20) == running.wait_ready().model.tokenize("Hello").tolist()
    assert name.result(20) == "amulet-planner"
    with pytest.raises(ZeroDivisionError):
        failing.result(20)
    assert running.stream("Hi", max_tokens=2).answer().pieces


def test_looks_wait_in_a_queue_that_ends(service: Service) -> None:
    running = service(max_waiting=2)
    running.wait_ready()
    gate, begun = threading.Event(), threading.Event()

    def wait(_: Amulet) -> bool:
        begun.set()
        return gate.wait(20)

    first = running.look(wait)
    assert begun.wait(20)
    others = [running.look(lambda _: True) for _ in range(2)]
    with pytest.raises(QueueFullError):
        running.look(lambda _: True)
    others[0].cancel()
    closing = threading.Thread(target=running.close)
    closing.start()
    until(lambda: running.is_closed)
    gate.set()
    closing.join(20)
    assert first.result(20)
    with pytest.raises(ClosedError):
        others[1].result(20)
    with pytest.raises(ClosedError):
        running.look(lambda _: True)
