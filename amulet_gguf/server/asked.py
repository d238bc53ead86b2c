"""What a request asks for, in whichever dialect it came, and how other programs spell it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from amulet_gguf.prompts.messages import Message
from amulet_gguf.prompts.tools import Tools
from amulet_gguf.server.errors import RequestError
from amulet_gguf.server.schemas import held
from amulet_gguf.settings import SETTINGS

#: Answers that one request may ask for.
MAX_ANSWERS: Final = 16
#: What other programs call some settings.
ALIASES: Final = {
    "negative_prompt": "avoid",
    "guidance_scale": "strength",
    "chat_template_kwargs": "template_args",
    "repetition_penalty": "repeat_penalty",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "json_schema": "schema",
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
}
#: Fields that mean nothing here, whatever their value: it does no harm to ignore them.
_IGNORED: Final = frozenset({
    "user", "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "safety_identifier", "verbosity", "cache_prompt", "keep_alive",
    "skip_special_tokens",
    "spaces_between_special_tokens", "id_slot", "n_keep", "n_discard",
    "reasoning_format", "parse_tool_calls", "mirostat_tau", "mirostat_eta",
    "dynatemp_exponent", "xtc_threshold", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "min_keep", "samplers", "backend_sampling", "priority", "request_id",
    "num_ctx", "num_batch", "num_gpu", "num_thread", "main_gpu", "use_mmap", "use_mlock", "numa",
    "low_vram", "truncate", "shift", "top_logprobs_format", "return_token_ids", "cache_salt",
})  # fmt: skip
#: Fields that would change the answer: only values that do not are taken.
_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "best_of": (0, 1),
    "echo": (False,),
    "suffix": ("",),
    "typical_p": (1,),
    "typ_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "top_n_sigma": (-1, 0),
    "top_a": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "penalize_newline": (False,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (0,),
    "post_sampling_probs": (False,),
    "adaptive_target": (-1,),
    "lora": ([],),
    "images": ([],),
    "image_data": ([],),
    "raw": (False,),
    "template": ("",),
    "context": ([],),
    "n_indent": (0,),
    "t_max_predict_ms": (0, -1),
    "grammar_lazy": (False,),
    "speculative.n_max": (0,),
}
#: Settings that a request may have; a system prompt is one of its messages.
_SETTINGS: Final = tuple(name for name in SETTINGS if name != "system")
_LEAST_TOP_P: Final = SETTINGS["top_p"].low


@dataclass(frozen=True)
class Asked:
    """What is asked for.

    Attributes:
        changes: fields of `Settings` that differ from what the server begins with; `max_tokens` None for
            as many as there may be.
        messages: a conversation, or None.
        texts: to go on with, each for an answer of its own, where there are no messages; or tokens of
            such texts.
        model: the name that was given, or None.
        profile: to begin with, or None.
        n: answers to each.
        is_adjustable: the strength may be changed while it is written.
        n_alternatives: explain each token with so many.
        draft: what the answer may be much like.
        tools: functions that the model may call.
        has_progress: a stream tells how much of the prompt is read.
    """

    changes: Mapping[str, Any]
    messages: Sequence[Message] | None = None
    texts: Sequence[str | Sequence[int]] = ()
    model: str | None = None
    profile: str | None = None
    n: int = 1
    is_adjustable: bool = False
    n_alternatives: int = 0
    draft: str | None = None
    tools: Tools | None = None
    has_progress: bool = False


def tools_in(
    functions: Sequence[Mapping[str, Any]] | None,
    choice: str | None,
    is_parallel: bool | None,
    allowed: Collection[str] | None = None,
) -> Tools | None:
    """Return the functions that a request lets the model call.

    Args:
        choice: "auto", "none", "required", or the name of the one to call; None: "auto".
        allowed: names of those that may be called; None: all.

    Raises:
        SettingError: see `Tools`.
        RequestError: one that is allowed is not there.
    """
    if not functions and choice not in (None, "auto", "none"):
        raise RequestError(400, "tool_choice needs tools", code="invalid_value", param="tool_choice")
    if not functions or choice == "none":
        return None
    offered = [_held_function(each) for each in functions]
    tools = Tools(offered, choice or "auto", is_parallel is not False)
    if allowed is None:
        return tools
    for name in allowed:
        if name not in tools.schemas:
            message = f"tool_choice: there is no function {name[:64]!r}"
            raise RequestError(400, message, code="invalid_value", param="tool_choice")
    chosen = [each for each in offered if each["function"]["name"] in allowed]
    return dataclasses.replace(tools, functions=chosen)


def _held_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a function with its schema in words that a grammar can be made of."""
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("parameters"), Mapping):
        return tool
    schema = held(function["parameters"], "tools", is_strict=function.get("strict") is True)
    return {**tool, "function": {**function, "parameters": schema}}


def changes_in(extra: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of `Settings` among those of a request that its schema does not name.

    What clients send because they always do, and what changes nothing here, is passed over.

    Args:
        known: names of the schema, for the cure of a misspelt one.

    Raises:
        RequestError: a field that is not known or not possible here.
    """
    given = {name: value for name, value in extra.items() if value is not None}
    for name, value in given.items():
        if (
            name not in _SETTINGS
            and name not in ALIASES
            and name not in _IGNORED
            and name != "ignore_eos"
        ):
            _check_neutral(name, value, known)
    for alias, name in ALIASES.items():
        if alias in given and name in given:
            raise RequestError(400, f"{alias} and {name} are the same: send one", param=alias)
        if alias in given:
            given[name] = given.pop(alias)
    changes = {name: usual(name, given[name]) for name in _SETTINGS if name in given}
    if given.get("ignore_eos") is True:
        changes["min_tokens"] = int(SETTINGS["min_tokens"].high)
    return changes


def usual(name: str, value: Any) -> Any:
    """Return the value of a setting as it is spelt here.

    Elsewhere -1 stands for "as many as there may be" or "by chance", an empty stop for none, and whole
    numbers come as 4.0.
    """
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    if SETTINGS[name].kind == "whole" and is_whole:
        value = int(value)
    if isinstance(value, bool):
        return value
    if name in ("max_tokens", "seed") and value in (-1, -2):
        return None
    if name in ("max_tokens", "min_tokens") and isinstance(value, int):
        return min(value, int(SETTINGS[name].high))
    if name in ("top_k", "repeat_last_n") and value == -1:
        return 0 if name == "top_k" else int(SETTINGS[name].high)
    if name == "top_p" and value == 0:
        return _LEAST_TOP_P
    if name == "seed" and isinstance(value, int):
        return value % 2**64
    if name == "stop" and isinstance(value, (str, list)):
        texts = [value] if isinstance(value, str) else value
        return [text for text in texts if text != ""]
    if name == "logit_bias" and isinstance(value, list):  # llama.cpp's: pairs, false for never
        return [
            (pair[0], -100 if pair[1] is False else pair[1])
            if isinstance(pair, list) and len(pair) == 2
            else pair
            for pair in value
        ]
    return value


def _check_neutral(name: str, value: Any, known: Collection[str]) -> None:
    if name not in _NEUTRAL:
        near = difflib.get_close_matches(name, (*known, *_SETTINGS), n=1)
        cure = f"; did you mean {near[0]}?" if near else ""
        message = f"unknown field {name[:64]!r}{cure}"
        raise RequestError(400, message, code="unknown_parameter", param=name[:64])
    if not any(
        value == each and isinstance(value, bool) == isinstance(each, bool) for each in _NEUTRAL[name]
    ):
        message = f"{name} is not supported by this server"
        raise RequestError(400, message, code="unsupported_parameter", param=name)
