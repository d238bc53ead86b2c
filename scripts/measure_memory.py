"""What models really take of memory, beside what is estimated: a table for the guide of `llama/`.

Usage: .venv/bin/python scripts/measure_memory.py [--n-ctx N]... [--cache-type TYPE] [MODEL]...
Each row is a process of its own that fills a context of two sequences, and decodes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import click

from amulet_gguf.amulet import Amulet
from amulet_gguf.llama.cache import CACHE_TYPES
from amulet_gguf.llama.memory import estimate
from amulet_gguf.models.find import find_model

_BESIDE: Final = 120  # tokens of a template and a preference, at most
_ANSWER: Final = 8


def peak_bytes() -> int:
    """Return the most memory that this process had at once."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":  # `getrusage` begins with what the parent had
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"^VmHWM:\s*(\d+)", status, re.MULTILINE)[1])  # type: ignore[index]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fill(path: str, n_ctx: int, cache_type: str) -> int:
    """Load a model, fill a context with a prompt with and without a preference; return the peak."""
    with Amulet.load(
        path, n_ctx=n_ctx, cache_type=cache_type, n_sequences=2, trust_model=True
    ) as amulet:
        room = n_ctx - _BESIDE - _ANSWER
        n_words = room
        while (n_tokens := len(amulet.model.tokenize("1 " * n_words))) > room:
            n_words = n_words * room // n_tokens
        amulet.generate("1 " * n_words, prefer="concise", strength=3, max_tokens=_ANSWER)
        return peak_bytes()


@click.command()
@click.argument("models", nargs=-1)
@click.option("--n-ctx", "sizes", type=int, multiple=True, default=(512, 2048, 4096), show_default=True)
@click.option("--cache-type", type=click.Choice(list(CACHE_TYPES)), default="f16", show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(models: tuple[str, ...], sizes: tuple[int, ...], cache_type: str, child: bool) -> None:
    """Measure MODELs, or the bundled one."""
    if child:
        print(fill(models[0], sizes[0], cache_type))
        return
    print("| model | n_ctx | estimated, MB | measured, MB | difference |\n|---|---|---|---|---|")
    for model in models or (None,):
        path = find_model(model)
        for n_ctx in sizes:
            command = [sys.executable, __file__, "--child", "--n-ctx", str(n_ctx), str(path)]
            command += ["--cache-type", cache_type]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout)
            estimated = estimate(path, n_ctx, 2, cache_type=cache_type).total
            print(
                f"| {path.stem} | {n_ctx:,} | {estimated / 1e6:,.0f} | {measured / 1e6:,.0f} | "
                f"{estimated / measured - 1:+.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
