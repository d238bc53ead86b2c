"""An evaluation in three passes, each resumable: answer, score with models, measure and tabulate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from amulet_gguf.amulet import Amulet, load_model
from amulet_gguf.batch.journal import Journal
from amulet_gguf.batch.records import Record, digest, identity
from amulet_gguf.batch.run import answers, result, size_batch
from amulet_gguf.errors import BatchError, PromptTooLongError, SettingError
from amulet_gguf.evaluation.questions import make_records
from amulet_gguf.evaluation.reading import Group, make_groups, read_ranks, reader_values
from amulet_gguf.evaluation.scoring import Scorer
from amulet_gguf.evaluation.table import Value
from amulet_gguf.evaluation.text_measures import text_measures
from amulet_gguf.llama.loading import Loading
from amulet_gguf.models.find import find_model
from amulet_gguf.preferences import Preference
from amulet_gguf.settings import Settings

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Response:
    """One answer of an evaluation.

    Attributes:
        line: its record.
        question: number of the question.
        system: the system prompt that the method used, if any.
    """

    line: int
    question: int
    prompt: str
    preference: str
    method: str
    text: str
    is_unfinished: bool
    system: str | None


@dataclass(frozen=True)
class Evaluation:
    """What is to be evaluated.

    Attributes:
        folder: where everything is written and found again.
        questions, preferences: every method answers every question for every preference.
        methods: settings by name.
        loading: of the model that answers, and how; the others are loaded in the same way, but that
            they measure with caches in float16.
        reward: model that says how probable answers are; not the one that answers. None leaves out
            perplexity, reward and likelihood.
        judge: model that compares answers in pairs; None leaves that out.
        against: the method that the others are compared to.
    """

    folder: Path
    questions: Sequence[str]
    preferences: Sequence[str]
    methods: Mapping[str, Settings]
    loading: Loading = field(default_factory=Loading)
    reward: str | None = None
    judge: str | None = None
    against: str = "prompting"

    def run(
        self,
        *,
        parallel: int | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> tuple[list[Response], list[Value]]:
        """Do what is not done yet, and return all answers and the measures of each.

        Raises:
            SettingError: the methods and models do not fit together.
            BatchError: the folder holds another evaluation, an answer failed, or a file cannot be
                written.
        """
        readers = read_ranks(self.folder)
        if (readers or self.judge is not None) and self.against not in self.methods:
            raise SettingError(
                f"answers are compared to those of {self.against!r}, which is not among them"
            )
        if self.reward is not None and identity(find_model(self.reward)) == identity(
            find_model(self.loading.model)
        ):
            raise SettingError(
                "the reward must come of another model than the answers: a model finds its own probable"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        responses = self._answer(parallel, progress)
        values: list[Value] = []
        if readers:
            values += reader_values(self.groups(responses), readers, self.against)
        values += self._measure(responses)
        if self.reward is not None:
            values += self._reward(responses, progress)
        if self.judge is not None:
            values += self._judge(responses, progress)
        return responses, values

    def _answer(self, parallel: int | None, progress: Progress) -> list[Response]:
        path = find_model(self.loading.model)
        records = make_records(self.questions, self.preferences, self.methods)
        keys = {record.line: record.key(identity(path, self.loading.cache_type)) for record in records}
        with Journal(self.folder / "responses.jsonl", keys) as journal:
            todo = [record for record in records if record.line not in journal.done]
            if todo:
                with load_model(self.loading, progress=_on_load(progress)) as model:
                    size = size_batch(model, todo, parallel=parallel, n_ctx=self.loading.n_ctx)
                    loading = replace(self.loading, n_ctx=size.n_ctx)
                    with Amulet.of(model, loading, size.n_sequences) as amulet:
                        for record, answer in answers(amulet, todo, size.parallel):
                            journal.append(record.line, result(record, answer))
                            progress("Answering", len(journal.done), len(records))
                journal.sort()
            results = list(journal.results())
        return [_response(record, found) for record, found in zip(records, results, strict=True)]

    def groups(self, responses: Sequence[Response]) -> list[Group]:
        """Return the answers as readers rank them."""
        return make_groups(
            [
                (each.question, each.prompt, preference, each.method, each.text)
                for each, preference in self._pairs(responses)
            ]
        )

    def _measure(self, responses: Sequence[Response]) -> Iterator[Value]:
        for response, preference in self._pairs(responses):
            measures = text_measures(
                response.text,
                is_unfinished=response.is_unfinished,
                preference=Preference.parse(preference).text,
                system=response.system,
            )
            for name, value in measures.items():
                yield Value(response.question, response.method, preference, name, value)

    def _pairs(self, responses: Sequence[Response]) -> Iterator[tuple[Response, str]]:
        """Yield each answer with the preference it is measured by; the base's with each in turn."""
        for preference in self.preferences:
            for response in responses:
                if response.preference in (preference, ""):
                    yield response, preference

    def _measuring(self, model: str | None) -> Loading:
        return replace(self.loading, model=model, cache_type="f16")

    def _reward(self, responses: Sequence[Response], progress: Progress) -> Iterator[Value]:
        name = identity(find_model(self.reward))
        pairs = sorted(self._pairs(responses), key=lambda pair: (pair[0].question, pair[1]))
        keys = {
            line: digest([response.prompt, response.text, preference, name])
            for line, (response, preference) in enumerate(pairs, 1)
        }
        with Journal(self.folder / "rewards.jsonl", keys) as journal:
            if len(journal.done) < len(pairs):
                with Scorer(self._measuring(self.reward), _on_load(progress)) as scorer:
                    for line, (response, preference) in enumerate(pairs, 1):
                        if line not in journal.done:
                            journal.append(line, _likelihoods(scorer, response, preference))
                            progress("Scoring", len(journal.done), len(pairs))
            scores = list(journal.results())
        for (response, preference), score in zip(pairs, scores, strict=True):
            base, preferred = score["base"], score["preferred"]
            if base is None or preferred is None:
                continue
            for measure, value in (
                ("perplexity", -base),
                ("reward", preferred - base),
                ("likelihood", preferred),
            ):
                yield Value(response.question, response.method, preference, measure, value)

    def _judge(self, responses: Sequence[Response], progress: Progress) -> Iterator[Value]:
        name = identity(find_model(self.judge))
        others = {
            (response.question, preference): response
            for response, preference in self._pairs(responses)
            if response.method == self.against
        }
        pairs = [pair for pair in self._pairs(responses) if pair[0].method != self.against]
        keys = {
            line: digest([r.prompt, r.text, others[r.question, preference].text, preference, name])
            for line, (r, preference) in enumerate(pairs, 1)
        }
        with Journal(self.folder / "judgements.jsonl", keys) as journal:
            if len(journal.done) < len(pairs):
                with Scorer(self._measuring(self.judge), _on_load(progress)) as scorer:
                    for line, (response, preference) in enumerate(pairs, 1):
                        if line not in journal.done:
                            other = others[response.question, preference]
                            journal.append(line, _verdict(scorer, response, other, preference))
                            progress("Judging", len(journal.done), len(pairs))
            verdicts = list(journal.results())
        for (response, preference), verdict in zip(pairs, verdicts, strict=True):
            if "score" in verdict:
                # One that contradicts itself when the order is swapped judged nothing: that is no tie.
                for measure, value in (
                    ("win_rate", verdict["score"] if verdict["agrees"] else math.nan),
                    ("no_judge", float(not verdict["agrees"])),
                ):
                    yield Value(response.question, response.method, preference, measure, value)


def _on_load(progress: Progress) -> Callable[[float], None]:
    return lambda fraction: progress("Loading the model", round(100 * fraction), 100)


def _response(record: Record, found: Mapping[str, Any]) -> Response:
    if "error" in found:
        raise BatchError(f"question {record.extra['question']}: {found['error']}")
    return Response(
        line=record.line,
        question=record.extra["question"],
        prompt=record.prompt or "",
        preference=record.extra["preference"],
        method=record.extra["method"],
        text=found["text"],
        is_unfinished=found["finish_reason"] == "length",
        system=record.settings.system,
    )


def _likelihoods(scorer: Scorer, response: Response, preference: str) -> dict[str, float | None]:
    """Return mean log-likelihoods per token; None for an empty answer or one that does not fit."""
    means: dict[str, float | None] = {}
    for name, text in (("base", None), ("preferred", Preference.parse(preference).text)):
        try:
            found = scorer.log_likelihood(response.prompt, text, response.text)
        except PromptTooLongError:
            found = np.empty(0)
        means[name] = float(found.mean()) if len(found) else None
    return means


def _verdict(scorer: Scorer, response: Response, other: Response, preference: str) -> dict[str, Any]:
    text = Preference.parse(preference).text
    try:
        verdict = scorer.compare(response.prompt, text, response.text, other.text)
    except PromptTooLongError as error:
        return {"error": str(error)}
    return {
        "score": verdict.score,
        "agrees": verdict.agrees,
        "first_shown": verdict.first_shown,
        "second_shown": verdict.second_shown,
        "mass": verdict.mass,
    }
