#!/usr/bin/env python
"""Whether tastes are found: people who were made up, with a hidden taste, choose; then it is tried.

    scripts/simulate_tastes.py QUESTIONS MODEL FOLDER

QUESTIONS is a JSON list of objects with "question": on the first 24 people choose, the next 8 try out
what was learned. Each person has hidden weights of one or two attributes, likes the answer with the
larger weighted sum of features, and errs one time in ten. They choose among answers that were written
beforehand, one for each attribute and one without; `amulet_gguf.taste` says which two they see. Then the
learned preferences answer new questions, and the person, who does not err any more, compares: with
the plain model, and with all attributes at equal weights. Answers are kept in FOLDER, and the same
command goes on where it stopped; it prints what was found and draws tastes.svg there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from amulet_gguf.amulet import Amulet
from amulet_gguf.engine.likelihood import result
from amulet_gguf.home.files import write_atomically
from amulet_gguf.method.arrays import Float64Array
from amulet_gguf.preferences import PRESETS
from amulet_gguf.settings import Settings
from amulet_gguf.taste.features import log_ratios
from amulet_gguf.taste.taste import Candidate, Choice, Taste

N_CHOOSE, N_TRY, N_TOKENS = 24, 8, 100
_AT_ONCE: Final = 9
COUNTS: Final = (3, 5, 10, 20, 40)
TRIED: Final = (5, 10, 20)
ERRORS: Final = 0.1
N_SEEDS: Final = 10  # for the attribute; the answers are tried for the first
NAMES: Final = list(PRESETS)
EQUAL: Final = {name: 1 / len(NAMES) for name in NAMES}
TASTES: Final[dict[str, list[dict[str, float]]]] = {
    "one attribute": [{name: 1.0} for name in NAMES],
    "one disliked": [{name: -1.0} for name in ("verbose", "formal", "creative", "sycophantic")],
    "two": [
        {"concise": 1.0, "creative": 0.6},
        {"uplifting": 1.0, "formal": 0.6},
        {"creative": 1.0, "sycophantic": -0.6},
        {"formal": 1.0, "verbose": -0.6},
        {"pleasant": 1.0, "complex": 0.6},
    ],
}


class Answers:
    """Answers to questions with their features, written when they are needed and kept."""

    def __init__(self, model: str, path: Path) -> None:
        self._path = path
        self._amulet = Amulet.load(model, n_ctx=1024, n_sequences=2 * _AT_ONCE)
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def write(self, question: str, wanted: Sequence[dict[str, float]]) -> None:
        """Write the answers to a question that are not known yet, several at once."""
        missing = [each for each in wanted if _key(question, each) not in self.known]
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            settings = {
                _key(question, each): Settings(prefer=tuple(each.items()), max_tokens=N_TOKENS)
                for each in some
            }
            texts = {
                key: answer.text for key, answer in self._amulet.compare(question, settings).items()
            }
            messages = [{"role": "user", "content": question}]
            reading = log_ratios(self._amulet, messages, list(texts.values()), list(PRESETS.values()))
            for (key, text), features in zip(texts.items(), result(reading).tolist(), strict=True):
                self.known[key] = {"text": text, "features": features}
            write_atomically(self._path, json.dumps(self.known, ensure_ascii=False))
            print(f"{len(self.known)} answers", end="\r", flush=True)

    def features(self, question: str, weights: dict[str, float]) -> Float64Array:
        """Return the features, (A,), of the answer with these preferences."""
        return np.array(self.known[_key(question, weights)]["features"])


def _key(question: str, weights: dict[str, float]) -> str:
    return json.dumps([question, weights], ensure_ascii=False)


def style(features: Float64Array) -> Float64Array:
    """Return features without what answers to any instruction share."""
    return np.asarray(features - np.median(features, axis=-1, keepdims=True))


def learn(
    hidden: Float64Array, features: Float64Array, sizes: Float64Array, seed: int
) -> dict[int, Taste]:
    """Return what a person teaches with so many choices.

    Args:
        features: (questions, 1 + A, A), of the answers without and with each attribute.
        sizes: (A,) of the differences between answers, in which a person's weights count.
    """
    chance, errors = random.Random(seed), np.random.default_rng(seed)
    taste, found = Taste("hidden"), {}
    arms = ["", *taste.attributes]
    order = errors.permutation(len(features))
    for n in range(1, max(COUNTS) + 1):
        question = features[order[n % len(features)]]
        candidates = [
            Candidate(
                text, dict(zip(taste.attributes, question[arms.index(text)].tolist(), strict=True)), text
            )
            for text in taste.pair(chance)
        ]
        first, second = (style(question[arms.index(each.prefer)]) for each in candidates)
        is_first = (first - second) / sizes @ hidden > 0
        if is_first == (errors.random() < ERRORS):
            candidates.reverse()
        taste.choices.append(Choice([], candidates[0], candidates[1]))
        if n in COUNTS:
            found[n] = Taste("hidden", choices=list(taste.choices))
    return found


def flat(lists: Iterable[Sequence[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(lists))


def share(values: Sequence[float]) -> str:
    """Return a mean as a percentage, with the half width of its interval."""
    half = 1.96 * float(np.std(values)) / len(values) ** 0.5
    return f"{100 * float(np.mean(values)):.0f} ± {100 * half:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    questions = [each["question"] for each in json.loads(given.questions.read_text())]
    to_choose, to_try = questions[:N_CHOOSE], questions[N_CHOOSE : N_CHOOSE + N_TRY]
    answers = Answers(given.model, given.folder / "answers.json")
    arms: list[dict[str, float]] = [{}, *({name: 1.0} for name in NAMES)]
    for question in to_choose:
        answers.write(question, arms)
    features = np.array([[answers.features(q, arm) for arm in arms] for q in to_choose])
    styles = style(features)
    differences = styles[:, :, None] - styles[:, None]
    sizes = np.sqrt((differences**2).mean(axis=(0, 1, 2)))

    right: dict[str, dict[int, list[float]]] = {}
    learned: list[tuple[str, int, Float64Array, dict[str, float]]] = []
    for group, tastes in TASTES.items():
        for weights, seed in itertools.product(tastes, range(N_SEEDS)):
            hidden = np.array([weights.get(name, 0.0) for name in NAMES])
            for n, taste in learn(hidden, features, sizes, seed).items():
                top = taste.weights()[0]
                is_right = np.sign(top.mean) * weights.get(top.name, 0.0) == np.abs(hidden).max()
                right.setdefault(group, {}).setdefault(n, []).append(float(is_right))
                if seed == 0 and n in TRIED:
                    found = {each.name: each.weight for each in taste.preferences()}
                    learned.append((group, n, hidden, found))

    wins: dict[tuple[str, str], dict[int, list[float]]] = {}
    for question in to_try:
        answers.write(question, [{}, EQUAL, *(found for *_, found in learned)])
        for group, n, hidden, found in learned:
            for against, others in (("plain", {}), ("equal", EQUAL)):
                new, old = (style(answers.features(question, each)) for each in (found, others))
                gain = float((new - old) / sizes @ hidden)
                won = 0.5 if gain == 0 else float(gain > 0)
                wins.setdefault((group, against), {}).setdefault(n, []).append(won)

    print(f"\n| choices | {' | '.join(map(str, COUNTS))} |")
    for group, rights in right.items():
        print(f"| top attribute right: {group} | {' | '.join(share(rights[n]) for n in COUNTS)} |")
    print(f"| all | {' | '.join(share(flat(f[n] for f in right.values())) for n in COUNTS)} |")
    for (group, against), won_by in wins.items():
        print(f"| over {against}: {group} | {' | '.join(share(won_by[n]) for n in TRIED)} |")
    for against in ("plain", "equal"):
        of_all = [flat(f[n] for (_, a), f in wins.items() if a == against) for n in TRIED]
        print(f"| over {against}: all | {' | '.join(map(share, of_all))} |")
    plot(given.folder / "tastes.svg", right, wins)


def plot(
    path: Path,
    right: dict[str, dict[int, list[float]]],
    wins: dict[tuple[str, str], dict[int, list[float]]],
) -> None:
    """Draw choices against shares."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="tight")
    axes = figure.subplots()
    lines: dict[str, tuple[Sequence[int], list[dict[int, list[float]]]]] = {
        "top attribute right": (COUNTS, list(right.values()))
    }
    for against, label in (("plain", "wins over the plain model"), ("equal", "wins over equal weights")):
        lines[label] = (TRIED, [found for (_, other), found in wins.items() if other == against])
    for label, (counts, groups) in lines.items():
        shares = [100 * float(np.mean(flat(found[n] for found in groups))) for n in counts]
        axes.plot(counts, shares, marker="o", label=label)
    axes.set(xlabel="choices", ylabel="%", ylim=(0, 100), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
