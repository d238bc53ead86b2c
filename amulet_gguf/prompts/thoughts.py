"""How models mark what they think before they answer."""

from __future__ import annotations

from typing import Final

#: What opens a thought, and what closes it, of the model families that have such marks.
MARKERS: Final[dict[str, str]] = {
    "<think>": "</think>",  # Qwen, DeepSeek, GLM, SmolLM, Nemotron, MiniMax, Granite, LFM, …
    "[THINK]": "[/THINK]",  # Mistral
    "<seed:think>": "</seed:think>",  # ByteDance Seed
    "◁think▷": "◁/think▷",  # Kimi VL
    "<|START_THINKING|>": "<|END_THINKING|>",  # Cohere
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|channel|>analysis<|message|>": "<|end|>",  # gpt-oss
}
#: Tokens that templates look for in what the assistant said before, to leave its thoughts out. Those of
#: gpt-oss end messages, too: they stay text.
IN_HISTORIES: Final = frozenset({
    "<think>", "</think>", "[THINK]", "[/THINK]", "<seed:think>", "</seed:think>", "◁think▷", "◁/think▷",
    "<|START_THINKING|>", "<|END_THINKING|>", "<|channel>", "<channel|>",
})  # fmt: skip
