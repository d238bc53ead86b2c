"""Where things are kept: the platform's folders, or all of them in $AMULET_HOME."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from amulet_gguf.errors import ConfigError


def _folder(platform_folder: Callable[..., str]) -> Path:
    home = os.environ.get("AMULET_HOME")
    try:  # older versions of platformdirs leave the "~" there where there is no home
        return Path(home or platform_folder("amulet", appauthor=False)).expanduser()
    except RuntimeError:
        raise ConfigError(
            "there is no home folder: set AMULET_HOME to a folder for models and conversations"
        ) from None


def config_file() -> Path:
    """The configuration: the default model and profiles."""
    return _folder(platformdirs.user_config_dir) / "config.toml"


def data_folder() -> Path:
    """What was made or fetched and should be kept."""
    return _folder(platformdirs.user_data_dir)


def models_folder() -> Path:
    """Models that `amulet models pull` fetched, as OWNER/REPO/FILE.gguf."""
    return data_folder() / "models"


def sessions_folder() -> Path:
    """Saved conversations."""
    return data_folder() / "sessions"


def tastes_folder() -> Path:
    """Choices that tastes were learned from."""
    return data_folder() / "tastes"


def cache_folder() -> Path:
    """What can be made again."""
    return _folder(platformdirs.user_cache_dir)


def history_file() -> Path:
    """What was typed in `amulet chat`, for its line editor."""
    return data_folder() / "history"


def welcomed_file() -> Path:
    """There is one once somebody has had a first answer here and was told what to try next."""
    return data_folder() / "welcomed"
