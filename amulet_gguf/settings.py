"""Everything that can be set for one generation: declared here alone."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypedDict, get_args

from amulet_gguf.declaration import Declared, declared, setting
from amulet_gguf.errors import SettingError, shown
from amulet_gguf.preferences import PRESETS, Preference, PreferencesLike, as_preferences

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

#: Where branches carry the preference.
Placement: TypeAlias = Literal["turn", "system"]
#: How much to think.
Effort: TypeAlias = Literal["low", "medium", "high"]
#: What `logit_bias` takes: numbers by token id or text.
BiasesLike: TypeAlias = (
    Mapping[int, float] | Mapping[str, float] | Mapping[int | str, float] | Iterable[str] | None
)
#: What `template_args` takes: JSON values by name, (name, value) pairs, or texts as NAME=VALUE.
ArgumentsLike: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]] | Iterable[str] | None

#: What `schema` takes: a JSON schema, as an object or as text, or a pydantic model.
SchemaLike: TypeAlias = Mapping[str, Any] | str | type | None

_GRAMMARS: Final = ("schema", "regex", "grammar")  # one of them at most
_MAX_GRAMMAR: Final = 262_144  # characters
_TEMPLATE_NAMES: Final = frozenset({
    "messages", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token", "eos_token",
})  # fmt: skip
#: The reference implementation's system prompt. It ends in the space that separates the preference.
PAPER_SYSTEM: Final = (
    "You are an AI designed to provide the most helpful, clear, and concise responses. Focus on giving "
    "actionable information, ensuring accuracy and detail without overwhelming the user. You should "
    "also be patient, polite, and calm. Avoid unnecessary complexity and always prioritize practical, "
    "user-friendly advice. "
)
#: `amulet_gguf.strength()`: alpha = lambda = 2, eta = 10 and 60 iterations, the paper's.
PAPER_STRENGTH: Final = 5.648699006951201


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments, with the types that are accepted for them."""

    prefer: PreferencesLike
    avoid: str | None
    strength: float | Literal["auto"] | None
    fade: float | Literal["auto", "none"] | None
    fade_to: float | Literal["auto"] | None
    plausibility: float
    withhold_echo: bool
    protect_facts: bool
    placement: Placement
    system: str | None
    max_tokens: int
    min_tokens: int
    stop: str | Iterable[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: BiasesLike
    seed: int | None
    template_args: ArgumentsLike
    date: str | None
    think: bool | None
    think_effort: Effort | None
    think_tokens: int | None
    align_thoughts: bool
    align_tool_calls: bool
    schema: SchemaLike
    regex: str | None
    grammar: str | None


@dataclass(frozen=True)
class Settings(Declared):
    """Settings of one generation; `SETTINGS` has their declarations, with help and ranges.

    `Options` says what each takes: `prefer` a text, a (text, weight), or a list of them; `stop` a
    text or several. More than the help says:

    - plausibility guards extrapolation, and does nothing where there is none (positive weights whose sum
      times strength is at most 1, or no preferences).
    - strength, fade, fade_to: at token t of an answer the strength is
      `fade_to + (strength - fade_to) exp(-t / fade)`, constant where fade is 0 or strength below
      fade_to. None: what `amulet_gguf.methods.resolve` finds for the model.
    - temperature and all that follows: see `amulet_gguf.method.sampling.Sampler`.

    Raises:
        SettingError: a value is not of its type or out of its range; it names the field.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[Options]) -> None: ...

    prefer: tuple[Preference, ...] = setting(
        (),
        "What the answer should be: one of "
        + ", ".join(PRESETS)
        + ", or a sentence of your own, or @FILE. Repeat "
        "for several; a negative weight pushes away.",
        "preferences",
        flag="-p",
        metavar="TEXT[:WEIGHT]",
    )
    avoid: str | None = setting(
        None,
        "What the answer should not be: beyond strength 1 it leads away from this instead of from the "
        "plain model; without --prefer, at any strength.",
        "text",
        metavar="TEXT",
    )
    strength: float | None = setting(
        None,
        "0: the base model, 1: ordinary prompting, more: amplified beyond it.",
        low=-100,
        high=1000,
        flag="-s",
        metavar="NUMBER",
        words={"auto": None},
        otherwise="what the model bears",
    )
    fade: float | None = setting(
        None,
        "Tokens of an answer after which a third is left of the strength above --fade-to; none: all.",
        low=0,
        high=1_000_000,
        metavar="TOKENS",
        words={"auto": None, "none": 0.0},
        otherwise="what the model bears",
    )
    fade_to: float | None = setting(
        None,
        "Strength that a fading one comes down to; a lower --strength is constant.",
        low=0,
        high=1000,
        metavar="NUMBER",
        words={"auto": None},
        otherwise="what the model bears",
    )
    plausibility: float = setting(
        0.2,
        "Rule out tokens less probable than this share of the best one, by ordinary prompting.",
        low=0,
        high=1,
    )
    withhold_echo: bool = setting(
        True,
        "Leave the words of the preference itself as they are, or amplify them, too.",
        "switch",
        off="--amplify-echo",
        otherwise="withhold",
    )
    protect_facts: bool = setting(
        True,
        "Leave names, numbers, quotations and code as prompting has them, or amplify them, too.",
        "switch",
        off="--amplify-facts",
        otherwise="protect",
    )
    placement: Placement = setting(
        "turn",
        "Say the preference at the end of your message, or of the system prompt.",
        "choice",
        choices=get_args(Placement),
    )
    system: str | None = setting(
        None, "System prompt.", "text", metavar="TEXT", otherwise="the model's own"
    )
    max_tokens: int = setting(
        512, "Length of the answer at most.", "whole", low=1, high=1_000_000, flag="-n"
    )
    min_tokens: int = setting(
        0, "Length of the answer at least, unless a stop text ends it.", "whole", low=0, high=1_000_000
    )
    stop: tuple[str, ...] = setting((), "End before this text. Repeatable.", "texts", metavar="TEXT")
    temperature: float = setting(0.0, "0: always the best token; more: more varied.", low=0, high=100)
    top_k: int = setting(0, "Keep the best k tokens; 0: all.", "whole", low=0, high=2**31 - 1)
    top_p: float = setting(1.0, "Keep the best tokens up to this probability.", low=0.001, high=1)
    min_p: float = setting(
        0.0, "Keep tokens at least this times as probable as the best.", low=0, high=1
    )
    repeat_penalty: float = setting(1.1, "Make recent tokens less probable; 1: off.", low=0.1, high=10)
    repeat_last_n: int = setting(64, "Tokens the penalty looks back.", "whole", low=0, high=65536)
    presence_penalty: float = setting(
        0.0, "Take this from the logits of all tokens that were written.", low=-2, high=2
    )
    frequency_penalty: float = setting(
        0.0, "Take this from the logits of tokens for each time they were written.", low=-2, high=2
    )
    logit_bias: tuple[tuple[int | str, float], ...] = setting(
        (),
        "Add a number to the logits of a token, by its id, or of a text's tokens (' the' is not 'the'): "
        "-100 bans them. Repeatable.",
        "biases",
        low=-100,
        high=100,
        metavar="TOKEN:BIAS",
    )
    seed: int | None = setting(None, "Same seed, same text.", "whole", low=0, high=2**64 - 1)
    template_args: tuple[tuple[str, str], ...] = setting(
        (),
        "A name for the model's chat template, and its value, JSON or a text: enable_thinking=false. "
        "Repeatable.",
        "arguments",
        flag="--template-arg",
        metavar="NAME=VALUE",
    )
    date: str | None = setting(
        None,
        "What a chat template takes for today, as 2026-11-26.",
        "text",
        metavar="DATE",
        otherwise="when the conversation began",
    )
    think: bool | None = setting(
        None,
        "Think before answering, or answer at once, with models that can do both.",
        "switch",
        off="--no-think",
        otherwise="as the model does",
    )
    think_effort: Effort | None = setting(
        None,
        "How much to think, with models that ask.",
        "choice",
        choices=get_args(Effort),
        otherwise="as the model does",
    )
    think_tokens: int | None = setting(
        None,
        "Tokens of a thought at most; then it is ended, and the answer begins.",
        "whole",
        low=0,
        high=1_000_000,
        metavar="NUMBER",
        otherwise="what leaves room for an answer",
    )
    align_thoughts: bool = setting(
        False,
        "Realign thoughts like the answer, or leave them as ordinary prompting has them.",
        "switch",
        off="--plain-thoughts",
        otherwise="plain",
    )
    align_tool_calls: bool = setting(
        False,
        "Realign calls of functions like the answer, or leave them as the plain model has them.",
        "switch",
        off="--plain-tool-calls",
        otherwise="plain",
    )
    schema: str | None = setting(
        None,
        "A JSON schema, or a file with one, that the answer obeys, token by token.",
        "schema",
        flag="--json-schema",
        metavar="FILE|JSON",
    )
    regex: str | None = setting(
        None, "A regular expression that the whole answer matches.", "text", metavar="REGEX"
    )
    grammar: str | None = setting(
        None,
        "A grammar, or a file with one, that the answer obeys: llama.cpp's GBNF, or Lark.",
        "text",
        metavar="FILE|TEXT",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.avoid is not None:
            try:
                avoid = Preference(self.avoid).text if self.avoid.strip() else None
            except SettingError as error:
                raise SettingError(str(error), "avoid") from None
            object.__setattr__(self, "avoid", avoid)
        if self.date is not None:
            try:
                datetime.date.fromisoformat(self.date)
            except ValueError:
                raise SettingError(
                    f"date must be a day as 2026-11-26, got {self.date!r}", "date"
                ) from None
        given = [name for name in _GRAMMARS if getattr(self, name) is not None]
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} exclude each other: give one", given[1])
        if given and not 1 <= len(getattr(self, given[0])) <= _MAX_GRAMMAR:
            raise SettingError(f"{given[0]} must have 1 to {_MAX_GRAMMAR} characters", given[0])
        taken = _TEMPLATE_NAMES.intersection(name for name, _ in self.template_args)
        if taken:
            raise SettingError(
                f"template_args: {min(taken)} is given to templates as it is", "template_args"
            )
        total = math.fsum(abs(preference.weight) for preference in self.prefer)
        most = max(abs(self.strength or 0), self.fade_to or 0)
        if most * total > SETTINGS["strength"].high:
            raise SettingError(
                f"strength {most:g} times weights of {total:g} is too large: lower one of them",
                "strength",
            )

    def replace(self, **options: Unpack[Options]) -> Self:
        """Return settings of which some differ; errors as for new ones."""
        return dataclasses.replace(self, **options)  # type: ignore[arg-type]

    @property
    def n_branches(self) -> int:
        """Branches that a generation may have: the base, each preference, and what is to be avoided."""
        return 1 + len(self.prefer) + (self.avoid is not None)

    def as_record(self) -> dict[str, Any]:
        """Return all fields as JSON values, as a record of a batch has them."""
        values = dataclasses.asdict(self)
        return {name: list(each) if isinstance(each, tuple) else each for name, each in values.items()}

    @classmethod
    def paper(cls, prefer: PreferencesLike = None) -> Self:
        """Return the settings of the reference implementation (arXiv 2502.19148).

        Its system prompt with the preference at the end, greedy, no mask, the full strength for
        every token, 128 tokens, and the strength of alpha = 2, lambda = 2, eta = 10 and 60 iterations.
        One thing differs on purpose: the prompt ends with the template's header of the assistant's turn,
        which the reference leaves out.
        """
        return cls(
            prefer=as_preferences(prefer),
            strength=PAPER_STRENGTH,
            fade=0.0,
            plausibility=0.0,
            withhold_echo=False,
            protect_facts=False,
            placement="system",
            system=PAPER_SYSTEM,
            repeat_penalty=1.0,
            max_tokens=128,
        )


def as_settings(settings: Settings | None) -> Settings:
    """Return settings to start from; None: the defaults.

    Raises:
        SettingError: it is something else.
    """
    if settings is None:
        return Settings()
    if not isinstance(settings, Settings):
        raise SettingError(f"expected amulet_gguf.Settings, got {shown(settings)}", "settings")
    return settings


#: The declarations of `Settings`, by name.
SETTINGS: Final = declared(Settings)


def describe(settings: Settings) -> str:
    """Return preferences and strength in few words: "concise, formal:0.5 · strength 3"."""
    if not settings.prefer and settings.avoid is None:
        return "no preference"
    parts = []
    for preference in settings.prefer:
        name = _short(preference)
        parts.append(name if preference.weight == 1 else f"{name}:{preference.weight:g}")
    if settings.avoid is not None:
        parts.append(f"not {_short(Preference(settings.avoid))}")
    strength = "auto" if settings.strength is None else f"{settings.strength:g}"
    return f"{', '.join(parts)} · strength {strength}"


def _short(preference: Preference) -> str:
    return preference.name if len(preference.name) <= 40 else preference.name[:39] + "…"
