"""Counters for Prometheus."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from amulet_gguf.engine.answer import Timings, Usage
from amulet_gguf.service.service import AmuletService

_SECONDS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What a server has done since it was started."""

    def __init__(self, service: AmuletService, paths: set[str]) -> None:
        """Begin at zero.

        Args:
            paths: that may be named: a stranger must not make up labels.
        """
        self._paths = paths
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "amulet_requests",
            "Responses by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self._prompt = Counter("amulet_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self._completion = Counter(
            "amulet_completion_tokens", "Tokens written.", registry=self._registry
        )
        self._first = Histogram(
            "amulet_first_token_seconds",
            "From the request to the first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        live = Gauge("amulet_live", "Answers being written.", registry=self._registry)
        live.set_function(lambda: service.n_live)
        waiting = Gauge("amulet_waiting", "Answers that wait.", registry=self._registry)
        waiting.set_function(lambda: service.n_waiting)

    def count_request(self, path: str, status: int) -> None:
        self._requests.labels(path if path in self._paths else "other", str(status or "gone")).inc()

    def count_answer(self, usage: Usage, timings: Timings) -> None:
        self._prompt.inc(usage.prompt_tokens)
        self._completion.inc(usage.completion_tokens)
        if usage.completion_tokens:
            self._first.observe(timings.queue + timings.prefill)

    def page(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self._registry)
