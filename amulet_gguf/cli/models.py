"""`amulet models`: fetch models, and see and choose among those on the machine."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from amulet_gguf.cli.options import complete_models
from amulet_gguf.cli.pull import pull
from amulet_gguf.cli.terminal import echo, echo_json
from amulet_gguf.errors import AmuletError, ModelNotFoundError
from amulet_gguf.home.text import on_one_line
from amulet_gguf.llama.cache import CACHE_TYPES, check_cache_type

if TYPE_CHECKING:
    from amulet_gguf.models.find import Installed


@click.group()
def models() -> None:
    """Fetch models, and see and choose among those on this machine."""


models.add_command(pull)


@models.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON list.")
def list_models(as_json: bool) -> None:
    """List the models on this machine; the one used without -m has a star.

    Models of the hub's cache, ollama and LM Studio are found too, and left alone.
    """
    from amulet_gguf.models.find import installed

    used = _default()
    rows = [_row(model, used) for model in installed()]
    if as_json:
        echo_json(rows)
        return
    if not rows:
        echo("there is no model yet: amulet models pull NAME fetches one", err=True)
        return

    from rich.table import Table

    from amulet_gguf.cli.screen import table_screen

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("NAME", "SIZE", "QUANT", "CONTEXT", "ARCHITECTURE", "SOURCE"):
        table.add_column(
            title, overflow="fold", justify="right" if title in ("SIZE", "CONTEXT") else "left"
        )
    for row in rows:
        star = " *" if row["default"] else ""
        cells = [row["name"] + star, f"{row['bytes'] / 1e6:,.0f} MB"]
        if "error" in row:
            cells += ["", "", "damaged"]
        else:
            context = f"{row['context_length']:,}"
            cells += [row["quantization"], context, f"{row['architecture']} {row['size']}".strip()]
        table.add_row(*cells, row["source"])
    table_screen().print(table)


@models.command()
@click.argument("name", required=False, shell_complete=complete_models)
@click.option("-c", "--n-ctx", type=click.IntRange(1, 2**24), default=4096, show_default=True)
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="f16", show_default=True)
@click.option("--template", is_flag=True, help="Write the chat template alone.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object.")
def show(name: str | None, n_ctx: int, cache_type: str, template: bool, as_json: bool) -> None:
    """Show what a model is, and the memory it will need."""
    from amulet_gguf.llama.devices import devices, offload
    from amulet_gguf.llama.gguf import parts, read_model
    from amulet_gguf.llama.memory import estimate
    from amulet_gguf.methods import auto_for, describe_auto
    from amulet_gguf.models.find import find_model

    path = find_model(name)
    header = read_model(path)
    source = header.text("tokenizer.chat_template")
    if template:
        echo(source, nl=not source.endswith("\n"))
        return
    files = parts(path)
    size = sum(file.stat().st_size for file in files)
    n_parameters = header.n_parameters
    auto = auto_for(n_parameters)
    found = devices()
    check_cache_type(header, cache_type)
    offloaded = offload(path, n_ctx, 2, found, cache_type=cache_type)
    memory = {n: estimate(path, n_ctx, 1 + n, cache_type=cache_type).total for n in (0, 1, 2)}
    record: dict[str, Any] = {
        "path": str(path),
        "name": header.text("general.name"),
        "architecture": header.architecture,
        "parameters": n_parameters,
        "quantization": header.quantization,
        "bytes": size,
        "files": len(files),
        "files_missing": max(0, header.n_parts - len(files)),
        "context_length": header.n_ctx_train,
        "layers": header.number("block_count"),
        "vocabulary": header.n_vocab,
        "licence": header.text("general.license") or None,
        "strength": {"strength": auto.strength, "fade": auto.fade, "fade_to": auto.fade_to},
        "chat_template": source or None,
        "memory": {
            "n_ctx": n_ctx,
            "cache_type": cache_type,
            "without_preference": memory[0],
            "one_preference": memory[1],
            "two_preferences": memory[2],
        },
        "offload": {
            "devices": [dataclasses.asdict(device) for device in found],
            "layers": offloaded.n_layers,
            "of": offloaded.of,
            "bytes": offloaded.n_bytes,
        },
    }
    if as_json:
        echo_json(record)
        return
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    missing = f", {record['files_missing']} missing" if record["files_missing"] else ""
    first = " ".join(source.split())
    lines = {
        "file": f"{path}{more}{missing}",
        "name": record["name"] or "not said",
        "architecture": f"{header.architecture}, {record['layers']} layers",
        "parameters": f"{n_parameters:,}",
        "quantization": f"{header.quantization}, {size / 1e6:,.0f} MB",
        "context": f"{header.n_ctx_train:,} tokens",
        "vocabulary": f"{header.n_vocab:,} tokens",
        "licence": record["licence"] or "not said",
        "template": f"{first[:60]}… ({len(source):,} characters; --template shows it)"
        if source
        else "none: ChatML is used",
        "strength": describe_auto(n_parameters),
        "memory": f"with {n_ctx:,} tokens of context, about {memory[0] / 1e6:,.0f} MB; with one "
        f"preference {memory[1] / 1e6:,.0f} MB, with two {memory[2] / 1e6:,.0f} MB",
    }
    if found:
        lines["offload"] = f"with one preference {offloaded} to {', '.join(map(str, found))}"
    for key, value in lines.items():
        echo(f"{key:<13} {on_one_line(value)}")


@models.command()
@click.argument("name", shell_complete=complete_models)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(name: str, yes: bool) -> None:
    """Delete a model that was pulled."""
    from amulet_gguf.home.paths import models_folder
    from amulet_gguf.llama.gguf import parts, shown
    from amulet_gguf.models.find import find_model

    path = find_model(name)
    folder = models_folder().resolve()
    # Neither a link to the outside, nor one from there: what is deleted is the name, not the target.
    path = path.parent.resolve() / path.name
    if not (path.is_relative_to(folder) and path.resolve().is_relative_to(folder)):
        raise ModelNotFoundError(f"{shown(path)} was not pulled by amulet: remove it with what made it")
    files = parts(path)
    if not files or not path.exists():
        raise ModelNotFoundError(f"there is no model file at {shown(path)}: see amulet models ls")
    size = sum(file.stat().st_size for file in files)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("say --yes to delete without being asked")
        click.confirm(f"Delete {shown(path)} ({size / 1e6:,.0f} MB)?", abort=True, err=True)
    try:
        for file in files:
            file.unlink()
        for parent in path.parents:
            if parent == folder or any(parent.iterdir()):
                break
            parent.rmdir()
    except OSError as error:
        raise ModelNotFoundError(f"{shown(path)} cannot be deleted: {error.strerror}") from None
    echo(f"deleted: {shown(path)}", err=True)


@models.command()
@click.argument("name", required=False, shell_complete=complete_models)
@click.option("--clear", is_flag=True, help="Go back to the bundled one.")
def default(name: str | None, clear: bool) -> None:
    """Show the model that is used without -m, or make NAME it."""
    from amulet_gguf.home.config import set_model
    from amulet_gguf.llama.gguf import read_header
    from amulet_gguf.models.find import find_model, installed

    if clear:
        set_model(None)
    elif name:
        path = find_model(name)
        read_header(path)
        # The whole name: a beginning can come to mean several.
        names = {model.path: model.name for model in installed() if Path(name).name != path.name}
        set_model(names.get(path, str(path.absolute())))
    if (clear or name) and os.environ.get("AMULET_MODEL"):
        echo("AMULET_MODEL goes before it: unset it to use the new one", err=True)
    echo(find_model())


def _default() -> Path | None:
    from amulet_gguf.models.find import find_model

    try:
        return find_model()
    except AmuletError:
        return None


def _row(model: Installed, used: Path | None) -> dict[str, Any]:
    from amulet_gguf.llama.gguf import quantization_in, read_header, size

    row: dict[str, Any] = {
        "name": model.name,
        "path": str(model.path),
        "source": model.source,
        "default": used is not None and model.path.resolve() == used.resolve(),
        "bytes": 0,
    }
    try:
        row["bytes"] = size(model.path)
        header = read_header(model.path, brief=True)
    except (AmuletError, OSError) as error:
        return row | {"error": str(error)}
    quantization = header.quantization
    return row | {
        "architecture": header.architecture,
        "size": header.text("general.size_label"),
        "quantization": quantization if quantization != "?" else quantization_in(model.name),
        "context_length": header.n_ctx_train,
    }
