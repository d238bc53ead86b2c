"""Messages and settings become a request that the engine can run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

from amulet_gguf.declaration import whole
from amulet_gguf.engine.drafts import Drafts, Source
from amulet_gguf.engine.request import CallRule, Request, ThoughtRule
from amulet_gguf.errors import SettingError, shown
from amulet_gguf.llama.model import Model
from amulet_gguf.method.arrays import Tokens
from amulet_gguf.method.echo import echo_tokens
from amulet_gguf.method.mixture import (
    Fade,
    Mixture,
    Realignment,
    coefficients,
    is_a_mean,
    realign,
)
from amulet_gguf.method.sampling import Sampler
from amulet_gguf.methods import resolve
from amulet_gguf.preferences import Preference
from amulet_gguf.prompts.calling import Calling, ways
from amulet_gguf.prompts.grammars import Grammars
from amulet_gguf.prompts.messages import Message, conversation, split, with_preference
from amulet_gguf.prompts.template import ChatTemplate
from amulet_gguf.prompts.thoughts import Thinking, Thoughts, follows, switches
from amulet_gguf.prompts.tools import Tools
from amulet_gguf.prompts.transcripts import Transcripts
from amulet_gguf.settings import Placement, Settings, as_settings

_MIN_AT_HAND = 64  # tokens: a shorter prompt holds nothing to repeat


class Planner:
    """Makes requests for one model."""

    def __init__(self, model: Model, drafter: Source | None = None) -> None:
        """Compile the model's chat template.

        Args:
            drafter: guesses tokens of all answers.

        Raises:
            PromptError: the template is not valid.
        """
        self.template = ChatTemplate(model)
        self._transcripts = lru_cache(maxsize=16)(self._new_transcripts)
        self._model = model
        self._drafter = drafter
        self._grammars = Grammars(model)
        # A slider asks again at every move.
        self._echo_tokens = lru_cache(maxsize=64)(partial(echo_tokens, model))

    def transcripts(self, settings: Settings, tools: Tools | None = None) -> Transcripts:
        """Return what was written where the chat template was given the same names."""
        return self._transcripts(
            settings.template_args,
            settings.date,
            False if settings.think_tokens == 0 else settings.think,
            settings.think_effort,
            tools,
        )

    def _new_transcripts(
        self,
        arguments: tuple[tuple[str, str], ...],
        date: str | None,
        think: bool | None,
        effort: str | None,
        tools: Tools | None,
    ) -> Transcripts:
        names = switches(think, effort) | {name: json.loads(value) for name, value in arguments}
        template = self.template.given(names, date=date, skips_thoughts=think is False, tools=tools)
        return Transcripts(template, self._model.token_bytes)

    def request(
        self,
        prompt: str | None,
        messages: Sequence[Message] | None,
        settings: Settings,
        *,
        text: str | Sequence[int] | None = None,
        reuse: bool = False,
        is_adjustable: bool = False,
        n_alternatives: int = 0,
        draft: str | None = None,
        tools: Tools | None = None,
    ) -> Request:
        """Return the request for a prompt, a conversation, or a text to go on with.

        Args:
            text: instead of the other two, what the model is to go on with, without a chat template, or
                its tokens; a preference stands before it, and the system prompt is left out.
            reuse, n_alternatives: see `Request`. With the first, the conversation begins with the tokens
                that the model wrote, where it wrote them.
            draft: what the answer may be much like, as one that was written with other settings: as far
                as it is, it comes sooner.
            tools: functions that the answer may call.
            is_adjustable: have all branches, needed or not: `mixture` gives other strengths later.

        Raises:
            PromptError: not exactly one is given, or it cannot be made into a prompt.
        """
        settings = self.resolve(settings)
        if tools is not None and not isinstance(tools, Tools):
            raise SettingError(f"tools must be amulet_gguf.Tools, got {type(tools).__name__}", "tools")
        if draft is not None and not isinstance(draft, str):
            raise SettingError(f"draft must be a text or None, got {shown(draft)}", "draft")
        n_alternatives = whole("n_alternatives", n_alternatives, 0, 2**31 - 1)
        calls_plainly = tools is not None and not settings.align_tool_calls
        needed = _realignment(settings, is_adjustable or calls_plainly)
        on_end: Callable[[Sequence[int]], None] | None = None
        thoughts: ThoughtRule | None = None
        texts = [None, *(preference.text for preference in settings.prefer), settings.avoid]
        if text is not None and prompt is None and messages is None:
            branches = [self.template.encode_text(text, texts[branch]) for branch in needed.branches]
        else:
            base = self.base(prompt, messages, settings)
            transcripts = self.transcripts(settings, tools)
            known = transcripts.known(base) if reuse else None
            placement = _placement(settings)
            began = self.template.beginnings.of(base)  # of all branches
            encoded = [
                transcripts.template.encode(
                    with_preference(base, texts[branch], placement), known, began
                )
                for branch in needed.branches
            ]
            branches = [each.tokens for each in encoded]
            thoughts = self._thoughts(settings, needed, encoded[0].text, split(base)[1])
            if reuse and base[-1]["role"] != "assistant":
                on_end = partial(transcripts.note, base)
        return Request(
            branches=branches,
            mixture=self._mixture(settings, needed),
            sampler=Sampler(settings, self._model),
            max_tokens=settings.max_tokens,
            min_tokens=settings.min_tokens,
            end_tokens=self._model.end_tokens if settings.min_tokens else None,
            stop=settings.stop,
            stop_tokens=self._named(settings.stop),
            reuse=reuse,
            n_alternatives=n_alternatives,
            on_end=on_end,
            drafts=self._drafts(branches, draft, is_adjustable),
            protects_facts=settings.protect_facts,
            thoughts=thoughts,
            grammar=self._grammars.of(settings),
            calls=None if tools is None else self._calls(settings, needed, tools),
        )

    def _calls(self, settings: Settings, needed: Realignment, tools: Tools) -> CallRule:
        """Return how calls are written: programs read them, so that preferences do not touch them."""
        form = self.template.form
        found = ways(form, tools, self._model, self._grammars.of_calls)
        alone = [float(branch == 0) for branch in needed.branches]
        return CallRule(
            Calling(found, tools, self._model),
            None if settings.align_tool_calls else Mixture(alone, alone),
        )

    def _thoughts(
        self, settings: Settings, needed: Realignment, prompt: str, begun: str
    ) -> ThoughtRule | None:
        """Return how the answer to a rendered prompt is thought about: as ordinary prompting would with
        the preference of the largest weight.

        Args:
            begun: what it begins with, at the end of the prompt.
        """
        marks = self.template.marks
        if marks is None:
            return None
        state = follows(marks, prompt)
        if begun:
            said = Thoughts(marks, "open")
            said.push(begun)
            state = "thought" if said.state == "thought" else "answer"
        if state == "answer":
            return None
        weights = [preference.weight for preference in settings.prefer]
        best = 1 + weights.index(max(weights)) if weights and max(weights) > 0 else 0
        alone = [float(branch == best) for branch in needed.branches]
        return ThoughtRule(
            Thinking(marks, state, self._model),
            None if settings.align_thoughts or 1.0 not in alone else Mixture(alone, alone),
            settings.think_tokens,
            self._model.tokenize(marks.ending, special=True).tolist(),
        )

    def _named(self, texts: Sequence[str]) -> frozenset[int]:
        """Return the control tokens of these names."""
        found = (self._model.tokenize(text, special=True).tolist() for text in texts)
        return frozenset(
            tokens[0] for tokens in found if len(tokens) == 1 and not self._model.token_bytes(tokens[0])
        )

    def _drafts(
        self, branches: Sequence[Tokens], draft: str | None, is_adjustable: bool
    ) -> Drafts | None:
        # A dial acts on the next token, not on the next but seven, unless drafts were asked for.
        prompt = max(branches, key=len)
        others = [] if self._drafter is None else [self._drafter]
        if draft is None and not others and (is_adjustable or len(prompt) < _MIN_AT_HAND):
            return None
        answer = None if draft is None else self._model.tokenize(draft, special=False)
        return Drafts.of(prompt, answer, others)

    def base(
        self, prompt: str | None, messages: Sequence[Message] | None, settings: Settings
    ) -> list[dict[str, Any]]:
        """Return the messages of the base branch; errors as `request`."""
        checked = conversation(prompt, messages, settings.system)
        return with_preference(checked, None, _placement(self.resolve(settings)))

    def resolve(self, settings: Settings) -> Settings:
        """Return settings with numbers for what is left to the model.

        What is to be avoided becomes an instruction; with no preference to go to, a negative one.
        """
        settings = as_settings(settings)
        if settings.avoid is not None:
            away = Preference(settings.avoid, -1.0)
            settings = settings.replace(
                prefer=settings.prefer or (away,), avoid=away.text if settings.prefer else None
            )
        return resolve(settings, self._model.n_parameters)

    def mixture(self, settings: Settings) -> Mixture:
        """Return the mixture of all branches, for an adjustable generation of these preferences."""
        settings = self.resolve(settings)
        return self._mixture(settings, _realignment(settings, True))

    def _mixture(self, settings: Settings, needed: Realignment) -> Mixture:
        weights = [preference.weight for preference in settings.prefer]

        def at(strength: float) -> list[float]:
            amounts = coefficients(weights, strength, settings.avoid is not None)
            return [amounts[branch] for branch in needed.branches]

        withheld = None
        if settings.withhold_echo and not is_a_mean(needed.coefficients):
            withheld = self._echo_tokens(tuple(p.text for p in settings.prefer if p.weight > 0))
        return Mixture(
            needed.coefficients,
            needed.reference,
            needed.plausibility,
            fade=_fade(settings),
            at=at,
            withheld=withheld,
        )


def _fade(settings: Settings) -> Fade:
    """Return the fade of settings that were resolved."""
    assert settings.strength is not None
    assert settings.fade is not None
    assert settings.fade_to is not None
    return Fade(settings.strength, settings.fade_to, settings.fade)


def _placement(settings: Settings) -> Placement:
    return settings.placement if settings.prefer else "turn"


def _realignment(settings: Settings, keep_branches: bool) -> Realignment:
    fade = _fade(settings)
    return realign(
        [preference.weight for preference in settings.prefer],
        fade.strength,
        settings.plausibility,
        until=None if fade.is_constant else fade.floor,
        has_contrast=settings.avoid is not None,
        keep_branches=keep_branches,
    )
