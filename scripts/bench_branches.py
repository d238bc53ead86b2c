#!/usr/bin/env python
"""Usage: python scripts/bench_branches.py [MODEL [TOKENS [ROUNDS]]]

What branches cost that are not needed: whole answers, sampled, in turns within one run, as time per
token over that of the plain model, medians of the rounds. And how many tokens need no base at all.
"""

from __future__ import annotations

import statistics
import sys
import time

from amulet_gguf.amulet import Amulet
from amulet_gguf.conversation.turns import Conversation
from amulet_gguf.engine.request import Request
from amulet_gguf.llama.threads import default_threads
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

STORY = "Write a long story about a lighthouse keeper and the sea, with many details, in ten paragraphs."


def timed(amulet: Amulet, settings: Settings, *, is_adjustable: bool) -> float:
    """Return seconds per token of a whole answer."""

    def plan(planner: Planner, resolved: Settings) -> Request:
        return planner.request(STORY, None, resolved, is_adjustable=is_adjustable)

    begin = time.perf_counter()
    answer = amulet.start(plan, settings, is_adjustable=is_adjustable).answer()
    return (time.perf_counter() - begin) / len(answer.pieces)


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
            times[name].append(timed(amulet, settings, is_adjustable=is_adjustable))
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


def decided(amulet: Amulet, n: int) -> None:
    """Count the tokens that ordinary prompting decides alone: at plausibility a, one that it gives more
    than 1 / (1 + a) leaves no other."""
    likely, all_of = 0, 0
    for prompt in ("What is a black hole?", "How do I learn to cook?", "Plan a day in Rome.", STORY):
        for preference in ("concise", "creative", "uplifting"):
            turn = Conversation(amulet).ask(prompt, prefer=preference, max_tokens=n)
            probabilities = [p.explanation.prompted for p in turn if p.explanation is not None]
            likely += sum(p > 1 / (1 + Settings().plausibility) for p in probabilities)
            all_of += len(probabilities)
    print(f"tokens that ordinary prompting decides alone: {100 * likely / all_of:.0f} % of {all_of}")


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 3
    with Amulet.load(model, n_ctx=2048, n_sequences=3, n_threads=default_threads()) as amulet:
        threads = amulet.engine.chosen_threads
        print(f"{amulet.model.path.name}, {threads} threads, answers of {n} tokens at most")
        branches(amulet, n, rounds)
        catch_up(amulet, min(n, 200))
        decided(amulet, min(n, 100))


if __name__ == "__main__":
    main()
