"""Models on this machine, and those that can be fetched."""

from amulet_gguf.models.find import Installed, bundled_model, find_model, installed

__all__ = ["Installed", "bundled_model", "find_model", "installed"]
