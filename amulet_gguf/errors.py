"""Every error that the package raises on purpose.

    AmuletError
    ├── SettingError            a value the caller chose is unusable (also a ValueError)
    ├── ModelError
    │   ├── ModelNotFoundError  no file there, or no model named at all (also a FileNotFoundError)
    │   ├── ModelFormatError    not a GGUF file, a damaged one, or one that cannot write text
    │   └── DownloadError       a model could not be fetched whole; what there is of it is kept
    ├── PromptError             empty, or refused by the model's chat template
    │   ├── PromptTooLongError  more tokens than the context holds
    │   └── TemplateLimitError  the chat template took too long or too much memory
    ├── EngineError             the runtime could not go on
    │   ├── NoRoomError         llama.cpp could not have the memory that it needs
    │   ├── NonFiniteLogitsError
    │   ├── QueueFullError      too many generations wait; those that run are not disturbed
    │   └── ClosedError
    ├── BatchError              the input or output of a batch cannot be used
    ├── ConfigError             the configuration file cannot be used (names file, line and key)
    ├── SessionError            a saved conversation cannot be used
    └── TasteError              a learned taste cannot be used

Each message is one line that says what is wrong and what to do about it.
"""

from __future__ import annotations

from typing import Any


class AmuletError(Exception):
    """Base of all errors raised on purpose by `amulet_gguf`. They can be copied and pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls `__init__` with the message, whatever that takes.
        kind, arguments, *state = tuple(super().__reduce__())
        return _again, (kind, arguments), *state


def _again(kind: type[AmuletError], arguments: tuple[Any, ...]) -> AmuletError:
    return kind.__new__(kind, *arguments)


class SettingError(AmuletError, ValueError):
    """A setting, preference or argument lies outside what it may be.

    Attributes:
        field: the name of the setting at fault; None where it is none, or several.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelError(AmuletError):
    """A model cannot be used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """There is no model file at the path, or no model was named."""


class ModelFormatError(ModelError):
    """The file is not a usable text-generation model in GGUF format."""


class DownloadError(ModelError):
    """A model could not be fetched: the network, the hub, the disk, or a wrong digest."""


class PromptError(AmuletError):
    """The conversation cannot be turned into a prompt."""


class TemplateLimitError(PromptError):
    """A chat template took too long or too much memory, or ended the process that rendered it."""


class PromptTooLongError(PromptError):
    """The prompt does not fit into the context.

    Attributes:
        n_prompt: tokens of the longest branch.
        n_ctx: tokens one sequence of the context holds.
    """

    def __init__(self, n_prompt: int, n_ctx: int) -> None:
        super().__init__(
            f"the prompt has {n_prompt} tokens and the context holds {n_ctx}, one of them for the "
            f"answer: shorten the prompt or raise n_ctx to more than {n_prompt}"
        )
        self.n_prompt = n_prompt
        self.n_ctx = n_ctx


class EngineError(AmuletError):
    """llama.cpp could not go on with a generation."""


class NoRoomError(EngineError):
    """A model or its context does not fit into the memory of the machine, or of its GPU."""


class NonFiniteLogitsError(EngineError):
    """The model produced NaN or infinite logits, so no token can be chosen honestly."""


class QueueFullError(EngineError):
    """The engine's queue is full: try again when generations have ended.

    Attributes:
        max_waiting: generations that the queue holds.
    """

    def __init__(self, max_waiting: int) -> None:
        super().__init__(f"{max_waiting} generations are waiting already: try again later")
        self.max_waiting = max_waiting


class ClosedError(EngineError):
    """The model, context or engine was closed before this call."""


class BatchError(AmuletError):
    """The input of a batch cannot be read, or its output belongs to something else."""


class ConfigError(AmuletError):
    """The configuration file has a mistake; the message names the file, the line and the key."""


class SessionError(AmuletError):
    """A saved conversation is missing, damaged, or from a newer version."""


class TasteError(AmuletError):
    """A learned taste is missing, damaged, from a newer version, or cannot be saved."""


def shown(value: Any) -> str:
    """Return a value as a message shows it: its beginning, on one line."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of thousands of digits
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= 200 else f"{text[:200]}…"
