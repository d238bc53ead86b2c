"""Many prompts: as many at once as pay, each answer as soon as it is finished."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from amulet_gguf.amulet import Amulet
from amulet_gguf.batch.records import Record
from amulet_gguf.engine.answer import Answer
from amulet_gguf.errors import AmuletError, BatchError, ClosedError
from amulet_gguf.llama.available import available_bytes
from amulet_gguf.llama.memory import Estimate, cache_bytes, estimate
from amulet_gguf.llama.model import Model
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.stream import Stream

#: Rows of one step beyond which a step grows as fast as its rows do (`amulet bench --rows`): those of 32
#: came 1.10 (0.5B) and 1.15 times (1.5B) as fast as those of 16.
_ROWS: Final = 32
_MEMORY_SHARE: Final = 0.5  # of the memory that is free


@dataclass(frozen=True)
class BatchSize:
    """How much of a batch runs at once, and what it takes.

    Attributes:
        parallel: generations at once.
        n_sequences: that they need together, at most.
        n_ctx: tokens that each sequence must hold.
        prompt_tokens: to be read, over all branches, a shared prefix counted for each.
        memory: of the process, when all of it is full.
    """

    parallel: int
    n_sequences: int
    n_ctx: int
    prompt_tokens: int
    memory: Estimate


def size_batch(
    model: Model,
    records: Sequence[Record],
    *,
    parallel: int | None = None,
    n_ctx: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BatchSize:
    """Find out how many generations to run at once, and how much context they need.

    Args:
        parallel: None: as many as pay, and as fit into half of the memory that is free.
        n_ctx: None: what the longest record needs, or what the model can if that is less.
        progress: called with records looked at, and all of them.
    """
    planner = Planner(model)
    branches, longest, total = 1, 1, 0
    limit = n_ctx or model.n_ctx_train or 2**24
    for number, record in enumerate(records, 1):
        try:
            request = planner.request(record.prompt, record.messages, record.settings)
        except AmuletError:
            continue  # told when its turn comes
        size = max(map(len, request.branches))
        if size < limit:
            branches = max(branches, len(request.branches))
            longest = max(longest, size + record.settings.max_tokens)
            total += sum(map(len, request.branches))
        if progress is not None:
            progress(number, len(records))
    size = n_ctx or min(longest, limit)
    if parallel is None:
        one = cache_bytes(model.header, size, branches, model.cache_type)
        fitting = int(available_bytes() * _MEMORY_SHARE / max(1, one))
        parallel = max(1, min(_ROWS // branches, fitting, len(records)))
    n_sequences = parallel * branches
    memory = estimate(model.path, size, n_sequences, cache_type=model.cache_type)
    return BatchSize(parallel, n_sequences, size, total, memory)


def answers(
    amulet: Amulet,
    records: Iterable[Record],
    parallel: int,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[tuple[Record, Answer | AmuletError]]:
    """Answer records, `parallel` at a time, and yield each as it is finished.

    A record that fails yields its error; the others go on. Closing the iterator cancels what runs.

    Args:
        on_step: called after each step with the tokens of all answers so far.

    Raises:
        ClosedError: the model was closed in the middle.
    """
    waiting = iter(records)
    running: dict[Stream, Record] = {}
    n_done = 0
    try:
        while True:
            while len(running) < parallel and (record := next(waiting, None)) is not None:
                if record.error is not None:
                    yield record, BatchError(record.error)
                    continue
                try:
                    stream = amulet.stream(
                        record.prompt, messages=record.messages, settings=record.settings
                    )
                except ClosedError:
                    raise
                except AmuletError as error:
                    yield record, error
                else:
                    running[stream] = record
            if not running:
                return
            amulet.engine.step()
            for stream in [stream for stream in running if stream.is_finished]:
                record = running.pop(stream)
                n_done += stream.usage.completion_tokens
                try:
                    answer: Answer | AmuletError = stream.answer()
                except ClosedError:
                    raise
                except AmuletError as error:
                    answer = error
                yield record, answer
            if on_step is not None:
                on_step(n_done + sum(stream.usage.completion_tokens for stream in running))
    finally:
        for stream in running:
            stream.close()


def result(record: Record, answer: Answer | AmuletError) -> dict[str, Any]:
    """Return what the output holds of an answered record."""
    if isinstance(answer, AmuletError):
        return {**record.extra, "error": str(answer)}
    return {
        **record.extra,
        "text": answer.text,
        **({"thought": answer.thought} if answer.thought else {}),
        "finish_reason": answer.finish_reason,
        "usage": dataclasses.asdict(answer.usage),
    }
