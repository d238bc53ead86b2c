"""Tastes over HTTP: what is known, which pair to show next, and what was chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

from fastapi import Query
from starlette.responses import Response

from amulet_gguf.errors import QueueFullError
from amulet_gguf.method.arrays import Float64Array
from amulet_gguf.preferences import Preference
from amulet_gguf.server.errors import as_json
from amulet_gguf.server.schema import TasteChoice, conversation
from amulet_gguf.service.service import AmuletService
from amulet_gguf.taste.features import log_ratios
from amulet_gguf.taste.taste import Candidate, Choice, Taste, forget, open_taste

_MAX_WAITING: Final = 8  # choices that wait to be read
#: Preferences of the client's that become attributes.
Own = Annotated[Sequence[str], Query(max_length=16)]


class Tastes:
    """Endpoints for the tastes of whoever runs the server."""

    def __init__(
        self, service: AmuletService, system: str | None, on_change: Callable[[], None]
    ) -> None:
        """Learn with the model of a service.

        Args:
            system: prompt of conversations that have none.
            on_change: called when a profile may have changed.
        """
        self._service = service
        self._system = system
        self._on_change = on_change
        self._is_free = asyncio.Lock()  # one reads at a time: each has a context of its own
        self._n_waiting = 0

    async def show(self, name: str, own: Own = ()) -> Response:
        """GET: what is known, and what to prefer in the next two answers."""
        return as_json(await asyncio.to_thread(_state, name, own))

    async def choose(self, name: str, body: TasteChoice) -> Response:
        """POST: learn from a choice; the reply is as `show`'s."""
        taste = await asyncio.to_thread(open_taste, name, map(Preference, body.own))
        messages = conversation(body.messages)
        if self._system and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self._system})
        answers = (body.better, body.worse)
        found = await self._read(messages, [each.text for each in answers], taste.attributes)
        better, worse = (
            Candidate(each.text, dict(zip(taste.attributes, row, strict=True)), _text(each.prefer))
            for each, row in zip(answers, found.tolist(), strict=True)
        )
        model = self._service.wait_ready().model.path.name
        await asyncio.to_thread(taste.add, Choice(messages, better, worse, model))
        self._on_change()
        return as_json(await asyncio.to_thread(_state, name, body.own))

    async def _read(
        self, messages: list[dict[str, Any]], texts: list[str], attributes: Sequence[str]
    ) -> Float64Array:
        if self._n_waiting >= _MAX_WAITING:
            raise QueueFullError(_MAX_WAITING)
        self._n_waiting += 1
        try:
            async with self._is_free:
                reading = self._service.work(
                    lambda amulet: log_ratios(amulet, messages, texts, attributes)
                )
                return await asyncio.wrap_future(reading)
        finally:
            self._n_waiting -= 1

    async def forget(self, name: str) -> Response:
        """DELETE: the choices and the profile."""
        await asyncio.to_thread(forget, name)
        self._on_change()
        return as_json({"name": name, "forgotten": True})


def _state(name: str, own: Sequence[str]) -> dict[str, Any]:
    taste: Taste = open_taste(name, map(Preference, own))
    return {
        "name": name,
        "choices": len(taste.choices),
        "prefer": [{"text": each.name, "weight": each.weight} for each in taste.preferences()],
        "attributes": [
            {"text": each.name, "mean": each.mean, "sureness": each.sureness} for each in taste.weights()
        ],
        "pair": [Preference(text).name if text else "" for text in taste.pair()],
    }


def _text(prefer: str) -> str:
    return Preference(prefer).text if prefer.strip() else ""
