#!/usr/bin/env python
"""Usage: python scripts/bench_branches.py [MODEL [TOKENS [ROUNDS]]]

What branches cost that are not needed, and what drafts save: whole answers, sampled, in turns within one
run, as time per token over that of the plain model; medians of the rounds.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.generation import Request
from amulet_gguf.llama.threads import default_threads
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

STORY = "Write a long story about a lighthouse keeper and the sea, with many details, in ten paragraphs."
TEXT = (
    "The report is late because two of the people who were to write it have been ill since the start of "
    "the month. We will send it on Friday. Do not call the office before then, as nobody can tell you "
    "more. The numbers that you asked for in your letter of the third are attached; check them, and "
    "tell us by Monday whether they are what you need. If they are not, we cannot help you before the "
    "end of the year, when everybody is back and the books are closed."
)


def timed(
    amulet: Amulet,
    prompt: str,
    settings: Settings,
    *,
    is_adjustable: bool = False,
    draft: str | None = None,
) -> tuple[float, str]:
    """Return seconds per token of a whole answer, without drafts unless there is one, and its text."""

    def plan(planner: Planner, resolved: Settings) -> Request:
        request = planner.request(prompt, None, resolved, is_adjustable=is_adjustable, draft=draft)
        return request if draft is not None else dataclasses.replace(request, drafts=None)

    begin = time.perf_counter()
    answer = amulet.start(plan, settings, is_adjustable=is_adjustable).answer()
    return (time.perf_counter() - begin) / len(answer.pieces), answer.text


def branches(amulet: Amulet, n: int, rounds: int) -> None:
    """Compare strengths whose branches are needed always, at first, or never."""
    plain = Settings(max_tokens=n, temperature=0.8, seed=5, repeat_penalty=1.0)
    liked = plain.replace(prefer="creative", fade=0)
    kinds = {
        "plain": (plain, False),
        "dial at 1": (liked.replace(strength=1), True),
        "dial at 0": (liked.replace(strength=0), True),
        "strength 3": (liked.replace(strength=3), True),
        "strength 3, a second of weight 0": (
            liked.replace(prefer=("creative", "formal:0"), strength=3),
            True,
        ),
        "6.65 fading to 1 (24)": (liked.replace(strength=6.65, fade=24, fade_to=1), False),
        "6.65 fading to 2 (48)": (liked.replace(strength=6.65, fade=48, fade_to=2), False),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, (settings, is_adjustable) in kinds.items():
            times[name].append(timed(amulet, STORY, settings, is_adjustable=is_adjustable)[0])
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, times["plain"], strict=True))
        print(f"{name:<34} {1000 * statistics.median(each):6.1f} ms per token {ratio:6.2f} x plain")


def catch_up(amulet: Amulet, n: int) -> None:
    """Time the token after a dial moved back from 1."""
    settings = Settings(prefer="creative", strength=1, fade=0, max_tokens=n + 9, temperature=0.8, seed=5)
    stream = amulet.start(
        lambda planner, resolved: planner.request(STORY, None, resolved, is_adjustable=True),
        settings,
        is_adjustable=True,
    )
    with stream:
        for _ in range(n):
            next(stream)
        stream.adjust(3.0)
        begin = time.perf_counter()
        next(stream)
        print(f"first token after {n} at strength 1: {1000 * (time.perf_counter() - begin):.0f} ms")


def drafts(amulet: Amulet, n: int, rounds: int) -> None:
    """Compare answers with and without drafts: greedy, by time per token."""
    restyled = Settings(prefer="uplifting", strength=4, fade=0, max_tokens=n)
    rewritten = Settings(prefer="Be warm.", strength=3, fade=0, max_tokens=n)
    rewrite = f"Make this friendlier, and change as little as you can:\n\n{TEXT}"
    old = timed(amulet, STORY, restyled.replace(strength=3))[1]
    for name, prompt, settings, draft in (
        ("restyle from strength 3 to 4", STORY, restyled, old),
        ("rewrite, with the text as draft", rewrite, rewritten, TEXT),
    ):
        ratios = [
            timed(amulet, prompt, settings)[0] / timed(amulet, prompt, settings, draft=draft)[0]
            for _ in range(rounds)
        ]
        print(f"{name:<34} {statistics.median(ratios):.2f} x as fast as without")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with Amulet.load(model, n_ctx=2048, n_sequences=3, n_threads=default_threads()) as amulet:
        threads = amulet.engine.chosen_threads
        print(f"{amulet.model.path.name}, {threads} threads, answers of {n} tokens at most")
        branches(amulet, n, rounds)
        catch_up(amulet, min(n, 200))
        drafts(amulet, n, rounds)


if __name__ == "__main__":
    main()
