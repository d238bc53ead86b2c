"""Tastes over HTTP: what is known, which pair to show next, and what was chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import Response

from amulet_gguf.preferences import Preference
from amulet_gguf.server.errors import as_json
from amulet_gguf.server.schema import TasteChoice, conversation
from amulet_gguf.service.service import AmuletService
from amulet_gguf.taste.features import log_ratios
from amulet_gguf.taste.taste import Candidate, Choice, Taste, forget, open_taste

#: Preferences of the client's that become attributes.
Own = Annotated[Sequence[str], Query(max_length=16)]


class Tastes:
    """Endpoints for the tastes of whoever runs the server."""

    def __init__(self, service: AmuletService, on_change: Callable[[], None]) -> None:
        """Learn with the model of a service.

        Args:
            on_change: called when a profile may have changed.
        """
        self._service = service
        self._on_change = on_change

    async def show(self, name: str, own: Own = ()) -> Response:
        """GET: what is known, and what to prefer in the next two answers."""
        return as_json(await asyncio.to_thread(_state, name, own))

    async def choose(self, name: str, body: TasteChoice) -> Response:
        """POST: learn from a choice; the reply is as `show`'s."""
        taste = await asyncio.to_thread(open_taste, name, map(Preference, body.own))
        messages = conversation(body.messages)
        texts = [body.better.text, body.worse.text]
        found = await asyncio.wrap_future(
            self._service.work(lambda amulet: log_ratios(amulet, messages, texts, taste.attributes))
        )
        better, worse = (
            Candidate(each.text, dict(zip(taste.attributes, row, strict=True)), each.prefer)
            for each, row in zip((body.better, body.worse), found.tolist(), strict=True)
        )
        model = self._service.wait_ready().model.path.name
        await asyncio.to_thread(taste.add, Choice(messages, better, worse, model))
        self._on_change()
        return as_json(await asyncio.to_thread(_state, name, body.own))

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
        "pair": list(taste.pair()),
    }
