"""Short names of small models that answer well for their size."""

from __future__ import annotations

from typing import Final

#: What `amulet models pull NAME` stands for.
CATALOGUE: Final[dict[str, str]] = {
    "smollm2-360m": "bartowski/SmolLM2-360M-Instruct-GGUF:Q8_0",
    "smollm2-1.7b": "bartowski/SmolLM2-1.7B-Instruct-GGUF:Q4_K_M",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct-GGUF:Q4_K_M",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct-GGUF:Q4_K_M",
    "llama3.2-1b": "bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M",
    "llama3.2-3b": "bartowski/Llama-3.2-3B-Instruct-GGUF:Q4_K_M",
    "gemma2-2b": "bartowski/gemma-2-2b-it-GGUF:Q4_K_M",
    "phi3.5-mini": "bartowski/Phi-3.5-mini-instruct-GGUF:Q4_K_M",
    "mistral-7b": "bartowski/Mistral-7B-Instruct-v0.3-GGUF:Q4_K_M",
}
