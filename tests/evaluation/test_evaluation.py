"""The evaluation: methods, tables, scoring models, and a whole run on tiny models."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fixture_types import MakeContext, Tiny

from amulet_gguf.cli import main
from amulet_gguf.errors import BatchError, EngineError, PromptTooLongError, SettingError
from amulet_gguf.evaluation.questions import make_records, sample_questions
from amulet_gguf.evaluation.run import Evaluation
from amulet_gguf.evaluation.scoring import Scorer, Verdict
from amulet_gguf.evaluation.table import ALL, Value, by_method, tabulate
from amulet_gguf.llama.loading import Loading
from amulet_gguf.llama.model import Model
from amulet_gguf.methods import METHODS, method
from amulet_gguf.prompts.planning import Planner
from amulet_gguf.settings import Settings

QUESTIONS = ["What is rain?", "Why is the sea salt?", "Who sleeps?"]
PREFERENCES = ["concise", "Write like a sailor."]


# Methods


def test_named_methods_differ_in_strength_alone() -> None:
    shared = Settings(max_tokens=7, temperature=0.5)
    strengths = {name: method(name, shared)[1].strength for name in METHODS}
    assert strengths == {
        "base": 0.0,
        "prompting": 1.0,
        "linear-alignment": 3.0,
        "amulet": shared.strength,
    }
    assert all(method(name, shared)[1].temperature == 0.5 for name in METHODS)


def test_the_papers_method_keeps_the_papers_settings_whatever_is_shared() -> None:
    _, settings = method("paper", Settings(max_tokens=7, plausibility=0.5))
    assert settings.system == Settings.paper().system
    assert settings.plausibility == 0
    assert settings.max_tokens == 7


def test_a_method_of_ones_own_is_settings_by_name() -> None:
    name, settings = method("hot:strength=8,temperature=0.7,placement=system", Settings())
    assert name == "hot"
    assert (settings.strength, settings.temperature, settings.placement) == (8, 0.7, "system")


@pytest.mark.parametrize(
    "written", ["nosuch", ":strength=1", "x:strenght=1", "x:strength", "x:prefer=formal", "x:strength=a"]
)
def test_a_method_that_means_nothing_is_refused(written: str) -> None:
    with pytest.raises(SettingError):
        method(written, Settings())


def test_every_method_answers_every_question_for_every_preference_and_the_base_once() -> None:
    methods = dict(method(name, Settings()) for name in METHODS)
    records = make_records(QUESTIONS, PREFERENCES, methods)
    assert [record.line for record in records] == list(range(1, len(records) + 1))
    cells = [(r.prompt, r.extra["method"], r.extra["preference"]) for r in records]
    assert len(set(cells)) == len(cells) == len(QUESTIONS) * (1 + 3 * len(PREFERENCES))
    assert all(len(r.settings.prefer) == (r.extra["preference"] != "") for r in records)


def write_questions(path: Path, questions: list[str]) -> Path:
    path.write_text(json.dumps([{"index": i, "question": q} for i, q in enumerate(questions)]))
    return path


def test_a_sample_has_no_question_twice_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "q.json", [f"Question {i}?" for i in range(50)])
    first = sample_questions(path, 20, seed=1)
    assert len(set(first)) == 20
    assert first == sample_questions(path, 20, seed=1) != sample_questions(path, 20, seed=2)
    assert sample_questions(path, None) == [f"Question {i}?" for i in range(50)]


def test_a_file_with_something_that_is_no_question_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": 3}\n')
    with pytest.raises(BatchError, match="record 2"):
        sample_questions(path, None)


# Tables


def test_the_mean_over_preferences_is_taken_within_questions() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 5))
    values = [
        Value(q, "m", p, "words", float(table[i, q])) for i, p in enumerate("ab") for q in range(5)
    ]
    results = {r.preference: r for r in tabulate(values)}
    assert results[ALL].value == pytest.approx(table.mean())
    assert results["a"].value == pytest.approx(table[0].mean())
    assert results[ALL].n == 10
    assert results[ALL].low < results[ALL].value < results[ALL].high


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        values = [Value(q, "m", "a", "words", float(x)) for q, x in enumerate(rng.normal(size=30))]
        result = tabulate(values)[1]
        hits += result.low <= 0 <= result.high
    assert 86 <= hits <= 99


def test_equal_values_have_no_spread_one_question_no_interval_and_nothing_no_mean() -> None:
    same = tabulate([Value(q, "m", "a", "words", 3.0) for q in range(4)])[0]
    assert (same.value, same.low, same.high) == (3, 3, 3)
    alone = tabulate([Value(0, "m", "a", "words", 3.0)])[0]
    assert alone.value == 3
    assert math.isnan(alone.low)
    nothing = tabulate([Value(q, "m", "a", "echo", math.nan) for q in range(3)])[0]
    assert math.isnan(nothing.value)
    assert nothing.n == 0


def test_perplexity_is_averaged_in_logarithms() -> None:
    logs = [1.0, 2.0, 4.0]
    result = tabulate([Value(q, "m", "a", "perplexity", x) for q, x in enumerate(logs)])[0]
    assert result.value == pytest.approx(math.exp(np.mean(logs)))
    assert math.exp(1) <= result.low <= result.value <= result.high <= math.exp(4)


# Scoring


def test_logits_after_each_of_several_tokens_are_those_after_each_alone(
    tiny_model: Model, make_context: MakeContext
) -> None:
    from amulet_gguf.llama.context import Context

    tokens = tiny_model.tokenize("the cat sat on the mat", special=False)
    one = make_context(tiny_model, 1)
    expected = []
    for token in tokens:
        one.add(0, np.array([token], np.int32), output=True)
        expected.append(one.decode()[0].copy())
    with Context(tiny_model, n_ctx=256, n_sequences=1, n_batch=64, n_threads=1, n_outputs=64) as context:
        context.add(0, tokens, output=True, n_outputs=len(tokens))
        np.testing.assert_allclose(context.decode(), expected, atol=0.05)


def test_more_logits_than_were_reserved_are_refused(
    tiny_model: Model, make_context: MakeContext
) -> None:
    context = make_context(tiny_model, 2, n_batch=16)
    with pytest.raises(EngineError, match="logits of 3 rows: 2 are made"):
        context.add(0, np.zeros(3, np.int32), output=True, n_outputs=3)


def test_log_likelihood_is_that_of_reading_token_by_token(
    tiny: Tiny, tiny_model: Model, make_context: MakeContext
) -> None:
    answer = "rain falls and falls. " * 20  # more tokens than one batch has rows
    prompt = Planner(tiny_model).request("What is rain?", None, Settings()).branches[0]
    tokens = tiny_model.tokenize(answer, special=False)
    assert len(tokens) > 128
    context = make_context(tiny_model, 1, n_ctx=512)
    context.add(0, prompt[:100], output=False)
    expected = []
    for i, token in enumerate(tokens):
        inputs = prompt if i == 0 else tokens[i - 1 : i]
        if i == 0:
            context.clear()
        context.add(0, inputs, output=True)
        row = context.decode()[0].astype(np.float64)
        row -= row.max()
        expected.append(row[token] - np.log(np.exp(row).sum()))
    with Scorer(Loading(model=tiny("llama"), n_threads=1)) as scorer:
        for _ in range(2):  # the second time, the prompt is in the cache
            found = scorer.log_likelihood("What is rain?", None, answer)
            np.testing.assert_allclose(found, expected, atol=0.05)
        for question in "abcd":  # fills the cache, and the first prompt goes
            scorer.log_likelihood(question, None, answer)
        np.testing.assert_allclose(
            scorer.log_likelihood("What is rain?", None, answer), expected, atol=0.05
        )
        assert len(scorer.log_likelihood("What is rain?", None, "")) == 0
        with pytest.raises(PromptTooLongError):
            scorer.log_likelihood("What is rain?", None, "rain " * 3000)


def test_a_judgement_turned_round_is_the_same_judgement(tiny: Tiny) -> None:
    with Scorer(Loading(model=tiny("llama"), n_threads=1)) as scorer:
        one = scorer.compare("What is rain?", "Be brief.", "Water.", "It is water that falls.")
        other = scorer.compare("What is rain?", "Be brief.", "It is water that falls.", "Water.")
    assert one.first_shown == pytest.approx(1 - other.second_shown, abs=1e-4)
    assert one.second_shown == pytest.approx(1 - other.first_shown, abs=1e-4)
    assert one.agrees == other.agrees
    assert one.score + other.score == 1
    assert 0 < one.mass < 1


def test_orders_that_disagree_are_a_tie() -> None:
    assert Verdict(0.9, 0.8, 1).score == 1
    assert Verdict(0.1, 0.2, 1).score == 0
    biased = Verdict(0.9, 0.2, 1)  # it always says A
    assert not biased.agrees
    assert biased.score == 0.5


# A whole run


def evaluation(folder: Path, tiny: Tiny, **changes: Any) -> Evaluation:
    shared = Settings(max_tokens=8)
    fields: dict[str, Any] = {
        "folder": folder,
        "questions": QUESTIONS,
        "preferences": PREFERENCES,
        "methods": dict(method(name, shared) for name in METHODS),
        "loading": Loading(model=tiny("llama"), n_threads=1),
        "reward": str(tiny("qwen3")),
        "judge": str(tiny("qwen3")),
    }
    return Evaluation(**(fields | changes))


def test_a_run_measures_every_method_and_a_second_run_does_nothing_again(
    tiny: Tiny, tmp_path: Path
) -> None:
    responses, values = evaluation(tmp_path, tiny).run()
    assert len(responses) == len(QUESTIONS) * (1 + 3 * len(PREFERENCES))
    table = by_method(tabulate(values), ALL)
    assert list(table) == list(METHODS)
    for name, row in table.items():
        assert row["reward"].n <= len(QUESTIONS) * len(PREFERENCES)
        assert {"words", "reward", "likelihood", "perplexity"} <= set(row)
        assert ("win_rate" in row) == (name != "prompting")
        assert row["likelihood"].value - row["reward"].value == pytest.approx(
            -math.log(row["perplexity"].value)
        )
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def nothing(what: str, done: int, total: int) -> None:
        raise AssertionError(f"{what} was done again")

    again = evaluation(tmp_path, tiny).run(progress=nothing)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert repr(again) == repr((responses, values))


@pytest.mark.parametrize("stop_at", [("Answering", 5), ("Scoring", 7), ("Judging", 11)])
def test_a_run_that_was_interrupted_goes_on(tiny: Tiny, tmp_path: Path, stop_at: Any) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, tiny).run(parallel=1, progress=stop)
    seen: dict[str, list[int]] = {}
    responses, _ = evaluation(tmp_path, tiny).run(
        parallel=1,
        progress=lambda what, done, total: seen.setdefault(what, []).append(done),
    )
    assert seen[stop_at[0]][0] == stop_at[1] + 1
    whole, _ = evaluation(tmp_path / "whole", tiny).run(parallel=1)
    assert responses == whole


def test_a_model_does_not_reward_itself(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="another model"):
        evaluation(tmp_path, tiny, reward=str(tiny("llama"))).run()


def test_a_judge_needs_the_method_to_compare_with(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="'nobody'"):
        evaluation(tmp_path, tiny, against="nobody").run()


def test_the_folder_of_another_evaluation_is_refused_and_left_alone(tiny: Tiny, tmp_path: Path) -> None:
    evaluation(tmp_path, tiny, reward=None, judge=None).run()
    before = (tmp_path / "responses.jsonl").read_bytes()
    with pytest.raises(BatchError, match="is not a result of this input"):
        evaluation(tmp_path, tiny, questions=["Other?"]).run()
    assert (tmp_path / "responses.jsonl").read_bytes() == before


def test_the_command_writes_answers_tables_and_reports(tiny: Tiny, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.json", QUESTIONS)
    folder = tmp_path / "out"
    arguments = ["eval", str(questions), "-o", str(folder), "--limit", "2", "-n", "8", "-t", "1"]
    models = ["-m", str(tiny("llama")), "--reward", str(tiny("qwen3")), "--judge", str(tiny("qwen3"))]
    done = CliRunner().invoke(main, [*arguments, *models, "-p", "concise", "-p", "verbose"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].startswith("method")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == list(METHODS)
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(METHODS)
    assert {row["preference"] for row in rows} == {ALL, "concise", "verbose"}
    assert len(json.loads((folder / "results.json").read_text())) == len(rows)
    assert "| prompting |" in (folder / "report.md").read_text()
    assert "<svg" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--method", "nosuch"], "no method 'nosuch'"),
        (["--prefer", "formal:0.5"], "no weight here"),
        (["--prefer", "consise"], "did you mean"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_mistakes_end_in_one_line_and_leave_no_folder(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    questions = write_questions(tmp_path / "q.json", QUESTIONS)
    folder = tmp_path / "out"
    done = CliRunner().invoke(main, ["eval", str(questions), "-o", str(folder), *arguments])
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert not folder.exists()
