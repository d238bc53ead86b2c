"""A batch over the nodes of a Ray cluster: one model per worker, each answer as soon as it is finished.

The driver holds all state: what waits, what runs where, and how often a record was lost. A worker only
answers. So a worker that ends, or a node that vanishes, costs nothing but the answers under way there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from amulet_gguf.batch.records import Record
from amulet_gguf.errors import AmuletError, BatchError, EngineError, ModelNotFoundError, SettingError
from amulet_gguf.llama.loading import Loading
from amulet_gguf.models.find import find_model

#: Tries of a record whose workers end while they answer it; the last one without neighbours, which
#: may have been the cause.
_MAX_TRIES: Final = 3
_MAX_STARTS: Final = 3  # of a worker that ends before its model is loaded
_PATIENCE: Final = 120.0  # seconds for which no worker at all may have a process
_POLL: Final = 5.0  # seconds
_REACHABLE: Final = 10.0  # seconds in which a cluster must take a connection
_HOST_PORT: Final = re.compile(r"(ray://)?(?P<host>[^:/]+):(?P<port>[0-9]{1,5})")
_SHOWN: Final = 300  # characters of Ray's explanation that an error repeats


def ray_answers(
    records: Sequence[Record],
    address: str,
    *,
    loading: Loading,
    n_sequences: int,
    parallel: int,
    n_workers: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Generator[tuple[Record, dict[str, Any]], None, None]:
    """Answer records on a Ray cluster, and yield each with its result as it is finished.

    A record that fails yields a result with "error"; the others go on. One whose worker ends is given
    to another, three times at most. Closing the iterator ends the workers. Ray stays connected if it
    was before; a cluster that was there goes on in any case.

    Args:
        address: as Ray takes it: "auto", "local" (this machine, started for this call), "HOST:PORT" or
            "ray://HOST:PORT".
        loading: of each worker. `model` is the path here and on each node; files of another size are
            refused. `n_threads` None: its share of its node's physical cores.
        n_sequences, parallel: of each worker; see `amulet_gguf.batch.run.BatchSize`.
        n_workers: None: one per GPU if the cluster has any and `n_gpu_layers` is not 0, otherwise as
            many as have `n_threads` CPUs each, and where that is None too, one per node.
        on_step: called after each answer with the tokens of all answers so far.

    Raises:
        ModelNotFoundError: the file is not here.
        SettingError: Ray is not installed, no cluster is at the address, or it lacks the CPUs or GPUs.
        EngineError: no worker can start, or one failed in a way that would fail again.
    """
    ray = _import_ray()
    is_ours = _connect(ray, address)
    cluster: _Cluster | None = None
    try:
        valid = [record for record in records if record.error is None]
        for record in records:
            if record.error is not None:
                yield record, _failed(record, record.error)
        if not valid:
            return
        places = choose_places(
            ray.nodes(), len(valid), n_workers, loading.n_threads, loading.n_gpu_layers != 0
        )
        path = find_model(loading.model).absolute()
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ModelNotFoundError(f"{path} cannot be read ({error.strerror}): check it") from None
        options = {**loading.options, "n_sequences": n_sequences}
        most = min(parallel, -(-len(valid) // len(places)))  # leave the others something to do
        cluster = _Cluster(ray, (str(path), size, options), most)
        n_tokens = 0
        for record, outcome in cluster.run(valid, places):
            n_tokens += outcome.get("usage", {}).get("completion_tokens", 0)
            if on_step is not None:
                on_step(n_tokens)
            yield record, outcome
    finally:
        if cluster is not None:
            cluster.close()
        if is_ours:
            ray.shutdown()


@dataclass(frozen=True)
class Place:
    """Where a worker is to run, and what it takes there.

    Attributes:
        node: its id.
        n_cpus, n_gpus: reserved for the worker.
        n_neighbours: workers on the node, itself included.
    """

    node: str
    n_cpus: int
    n_gpus: int
    n_neighbours: int


def choose_places(
    nodes: Sequence[Mapping[str, Any]],
    n_records: int,
    n_workers: int | None,
    n_threads: int | None,
    use_gpus: bool,
) -> list[Place]:
    """Choose the nodes of the workers in turn, so that they are spread evenly.

    Args:
        nodes: as `ray.nodes()` tells them.
        n_records: no more workers than these.
        n_workers, n_threads: see `ray_answers`.
        use_gpus: one for each worker, if the cluster has any.

    Raises:
        SettingError: the cluster has no room for the workers.
    """
    cpus = {n["NodeID"]: int(n["Resources"].get("CPU", 0)) for n in nodes if n["Alive"]}
    gpus = {n["NodeID"]: int(n["Resources"].get("GPU", 0)) for n in nodes if n["Alive"]}
    needs_gpu = use_gpus and any(gpus.values())
    each = 1 if n_threads is None else n_threads
    if each < 1:
        raise SettingError(f"n_threads must be at least 1, got {n_threads}")
    room = {node: min(n // each, gpus[node]) if needs_gpu else n // each for node, n in cpus.items()}
    total = sum(room.values())
    if (n_workers or 1) > total:
        kind = f"{each} CPUs" + (" and a GPU" if needs_gpu else "")
        raise SettingError(
            f"the Ray cluster has room for {total} workers of {kind}: lower --workers or --n-threads"
        )
    if n_workers is None:
        fill = needs_gpu or n_threads is not None
        n_workers = total if fill else sum(n > 0 for n in room.values())
    rounds = range(max(room.values()))
    chosen = [node for turn in rounds for node, n in room.items() if turn < n][
        : min(n_workers, n_records)
    ]
    counts = Counter(chosen)
    return [
        Place(node, n_threads or cpus[node] // counts[node], int(needs_gpu), counts[node])
        for node in chosen
    ]


#: Read when Ray is imported: no reports home, no messages of nodes on our stdout (log_to_driver does not
#: cover these), no warning about Ray's own future.
_ENVIRONMENT: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def _import_ray() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise SettingError("--ray needs pip install 'amulet-gguf[ray]'") from None
    return ray


def _connect(ray: Any, address: str) -> bool:
    """Connect to a cluster; return whether that was needed."""
    if ray.is_initialized():
        return False
    more = {"include_dashboard": False} if address == "local" else {}
    try:
        if match := _HOST_PORT.fullmatch(address):  # Ray itself would try for minutes, and say so
            socket.create_connection((match["host"], int(match["port"])), _REACHABLE).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    except (OSError, OverflowError, RuntimeError, ValueError, ImportError) as error:
        raise SettingError(
            f"no Ray cluster at {address!r} ({_line(error)}): start one with ray start, or say local"
        ) from None
    return True


def _line(error: object) -> str:
    """Return what Ray says in many lines as one that is not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _failed(record: Record, reason: str) -> dict[str, Any]:
    from amulet_gguf.batch.run import result

    return result(record, BatchError(reason))


class _Worker:
    """What runs on a node, in a process of its own, with one thread per answer under way."""

    def host(self) -> str:
        return socket.gethostname()

    def load(self, path: str, size: int, options: dict[str, Any], n_neighbours: int) -> str | None:
        """Load the model; return what is wrong with it, or None. Errors cross as text alone."""
        from amulet_gguf.llama.threads import default_threads
        from amulet_gguf.service.service import AmuletService

        n_threads = options["n_threads"] or max(1, default_threads() // n_neighbours)
        try:
            # The driver limits what waits.
            self._service = AmuletService(
                path, max_waiting=sys.maxsize, **{**options, "n_threads": n_threads}
            )
            self._service.wait_ready()
        except AmuletError as error:
            return str(error)
        if Path(path).stat().st_size != size:
            return f"{path} is another model there: copy the same file to every node"
        return None

    def answer(self, record: Record) -> dict[str, Any]:
        from amulet_gguf.batch.run import result
        from amulet_gguf.engine.answer import Answer

        answer: Answer | AmuletError
        try:
            # Nothing cached is reused: a result must not depend on what was answered before.
            answer = self._service.start(
                lambda planner, settings: planner.request(record.prompt, record.messages, settings),
                record.settings,
            ).answer()
        except AmuletError as error:
            answer = error
        return result(record, answer)


@dataclass(eq=False)
class _Task:
    record: Record
    tries: int = 0  # that ended with their worker

    @property
    def is_last_try(self) -> bool:
        return self.tries == _MAX_TRIES - 1


@dataclass(eq=False)
class _Slot:
    """A worker as the driver sees it."""

    place: Place
    starts: int  # without success so far, this one included
    actor: Any
    limit: int  # answers at once
    host: str | None = None  # known once its process runs
    is_ready: bool = False
    running: int = 0


@dataclass(eq=False)
class _Cluster:
    """The workers, and the records that wait for one.

    Attributes:
        model: arguments of `_Worker.load`.
        parallel: answers at once in each worker.
    """

    ray: Any
    model: tuple[str, int, dict[str, Any]]
    parallel: int
    slots: list[_Slot] = field(default_factory=list)
    waiting: deque[_Task] = field(default_factory=deque)
    #: What each call is about: a record, or "host" or "load".
    calls: dict[Any, tuple[_Slot, _Task | str]] = field(default_factory=dict)

    def run(self, records: Sequence[Record], places: Sequence[Place]) -> Iterator[tuple[Record, Any]]:
        self.waiting.extend(_Task(record) for record in records)
        left = len(self.waiting)
        for place in places:
            self._start(place, 1)
        seen = time.monotonic()
        while left:
            self._dispatch()
            ended, _ = self.ray.wait(list(self.calls), timeout=_POLL)
            if any(slot.host for slot in self.slots):
                seen = time.monotonic()
            elif time.monotonic() - seen > _PATIENCE:
                raise EngineError(
                    f"no Ray worker has started for {_PATIENCE:.0f} s: see in ray status whether other "
                    "work has taken the CPUs, and lower --workers or --n-threads"
                )
            outcomes = [outcome for ref in ended if (outcome := self._take(ref)) is not None]
            self._dispatch()  # before the caller writes to its disk
            left -= len(outcomes)
            yield from outcomes

    def close(self) -> None:
        for slot in self.slots:
            self._kill(slot)

    def _start(self, place: Place, starts: int) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = (
            self.ray.remote(_Worker)
            .options(
                num_cpus=place.n_cpus,
                num_gpus=place.n_gpus,
                max_concurrency=self.parallel,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=True),
            )
            .remote()
        )
        slot = _Slot(place, starts, actor, self.parallel)
        self.slots.append(slot)
        self.calls[actor.host.remote()] = slot, "host"
        self.calls[actor.load.remote(*self.model, place.n_neighbours)] = slot, "load"

    def _kill(self, slot: _Slot) -> None:
        with contextlib.suppress(Exception):  # it may be gone, and so may the cluster
            self.ray.kill(slot.actor)

    def _dispatch(self) -> None:
        """Give the records that wait to the workers that have least to do."""
        while self.waiting:
            task = self.waiting[0]
            free = [slot for slot in self.slots if slot.is_ready and slot.running < slot.limit]
            slot = min(free, key=lambda slot: slot.running, default=None)
            if slot is None or (task.is_last_try and slot.running):
                return
            self.waiting.popleft()
            slot.limit = 1 if task.is_last_try else self.parallel
            slot.running += 1
            self.calls[slot.actor.answer.remote(task.record)] = slot, task

    def _take(self, ref: Any) -> tuple[Record, dict[str, Any]] | None:
        """Take note of a call that has ended; return its record and result, if it gave one."""
        slot, about = self.calls.pop(ref)
        try:
            value = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:  # no AmuletError: it would fail again
            raise EngineError(f"a Ray worker failed: {_line(error.cause)}") from error
        except self.ray.exceptions.RayError as error:
            return self._lost(slot, about, _line(error))
        if about == "host":
            slot.host = value
        elif about == "load":
            if value is not None:
                raise EngineError(f"the Ray worker on {slot.host} cannot load the model: {value}")
            slot.is_ready = True
        elif isinstance(about, _Task):
            slot.running -= 1
            return about.record, value
        return None

    def _lost(
        self, slot: _Slot, about: _Task | str, reason: str
    ) -> tuple[Record, dict[str, Any]] | None:
        """Replace a worker that ended, if that is not done yet; its record waits again, or fails."""
        if slot in self.slots:
            self.slots.remove(slot)
            self._kill(slot)
            if not slot.is_ready and slot.starts >= _MAX_STARTS:
                if not self.slots:
                    raise EngineError(f"the Ray workers end before they answer anything: {reason}")
            else:
                self._start(slot.place, 1 if slot.is_ready else slot.starts + 1)
        if not isinstance(about, _Task):
            return None
        about.tries += 1
        if about.tries == _MAX_TRIES:
            text = f"its worker ended each of {_MAX_TRIES} times it was tried: {reason}"
            return about.record, _failed(about.record, text)
        if about.is_last_try:
            self.waiting.append(about)  # behind all others, when the workers have nothing else to do
        else:
            self.waiting.appendleft(about)
        return None
