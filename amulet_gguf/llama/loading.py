"""How to load a model: all that can be set, declared here alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final, TypedDict

from amulet_gguf.declaration import Declared, declared, setting
from amulet_gguf.llama.cache import CACHE_TYPES


class LoadOptions(TypedDict, total=False):
    """The fields of `Loading` as keyword arguments, but for the model."""

    n_ctx: int | None
    n_gpu_layers: int | None
    n_threads: int | None
    n_batch: int | None
    cache_type: str
    rpc: str | None
    draft_model: str | os.PathLike[str] | None
    chat_template: str | os.PathLike[str] | None
    trust_model: bool


@dataclass(frozen=True)
class Loading(Declared):
    """How to load a model; `LOADING` has the declarations, with help and ranges.

    Raises:
        SettingError: a value is not of its type or out of its range; it names the field.
    """

    model: str | os.PathLike[str] | None = setting(
        None,
        "File, name or prefix of a model (amulet models ls). Otherwise $AMULET_MODEL, the default "
        "model, or the bundled one.",
        "path",
        flag="-m",
        metavar="TEXT",
    )
    n_ctx: int | None = setting(
        None,
        "Tokens of prompt and answer together.",
        "whole",
        low=1,
        high=2**24,
        flag="-c",
        otherwise="4096, or the model's if less",
    )
    n_gpu_layers: int | None = setting(
        None,
        "Layers to run on the GPU, -1 for all.",
        "whole",
        low=-1,
        high=100_000,
        otherwise="as many as fit",
    )
    n_threads: int | None = setting(
        None, "CPU threads.", "whole", low=1, high=1024, flag="-t", otherwise="physical cores"
    )
    n_batch: int | None = setting(
        None,
        "Tokens of a prompt that are read in one step.",
        "whole",
        low=1,
        high=2**31 - 1,
        otherwise="128, on a GPU 512",
    )
    cache_type: str = setting(
        "f16",
        "Numbers of the KV cache: q8_0 halves its memory, q4_0 quarters it at a cost in quality; with "
        "either, a CPU reads long prompts about half as fast.",
        "choice",
        choices=tuple(CACHE_TYPES),
    )
    rpc: str | None = setting(
        None,
        "Spread the model over llama.cpp's RPC servers, on a network that you trust.",
        "text",
        metavar="HOST:PORT[,…]",
    )
    draft_model: str | os.PathLike[str] | None = setting(
        None,
        "A smaller model of the same vocabulary: it guesses tokens, which the model verifies several at "
        "a time, where that pays.",
        "path",
        metavar="TEXT",
    )
    chat_template: str | os.PathLike[str] | None = setting(
        None,
        "A file with the chat template (Jinja) to use.",
        "path",
        metavar="FILE",
        otherwise="the model's own",
    )
    trust_model: bool = setting(
        False,
        "Load a model file at once, or try one that is new here first in a process that it may end.",
        "switch",
        off="--try-model",
        otherwise="try",
    )

    @property
    def options(self) -> LoadOptions:
        """All but the model, as keyword arguments."""
        return {
            "n_ctx": self.n_ctx,
            "n_gpu_layers": self.n_gpu_layers,
            "n_threads": self.n_threads,
            "n_batch": self.n_batch,
            "cache_type": self.cache_type,
            "rpc": self.rpc,
            "draft_model": self.draft_model,
            "chat_template": self.chat_template,
            "trust_model": self.trust_model,
        }


#: The declarations of `Loading`, by name.
LOADING: Final = declared(Loading)
