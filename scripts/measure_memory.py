"""What models really take of memory, beside what is estimated: a table for the guide of `llama/`.

Usage: .venv/bin/python scripts/measure_memory.py [--n-ctx N]... [MODEL]...
Each row is a process of its own that fills a context of two sequences, and decodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from amulet_gguf.amulet import Amulet
from amulet_gguf.llama.memory import estimate
from amulet_gguf.models.find import find_model


def peak_bytes() -> int:
    """Return the most memory that this process had at once."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def fill(path: str, n_ctx: int) -> int:
    """Load a model, fill the context with and without a preference, and return the peak."""
    n_answer = 8
    with Amulet.load(path, n_ctx=n_ctx, n_sequences=2, trust_model=True) as amulet:
        # At strength 0 the base, and with it the shared prompt, would be all that is read.
        room = amulet.engine.n_ctx - n_answer
        text, n_words = "", room
        while True:  # as many words as fit beside the template and the preference
            text = " ".join(str(number % 10) for number in range(n_words))
            n_prompt = len(amulet.model.tokenize(text)) + 120
            if n_prompt <= room:
                break
            n_words -= max(1, (n_prompt - room) // 2)
        amulet.generate(text, prefer="concise", strength=3, max_tokens=n_answer)
        return peak_bytes()


@click.command()
@click.argument("models", nargs=-1)
@click.option("--n-ctx", "sizes", type=int, multiple=True, default=(512, 2048, 4096), show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(models: tuple[str, ...], sizes: tuple[int, ...], child: bool) -> None:
    """Measure MODELs, or the bundled one."""
    if child:
        print(fill(models[0], sizes[0]))
        return
    print("| model | n_ctx | estimated, MB | measured, MB | difference |\n|---|---|---|---|---|")
    for model in models or ("bundled",):
        path = Path(find_model(model if models else None))
        for n_ctx in sizes:
            command = [sys.executable, __file__, "--child", "--n-ctx", str(n_ctx), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(done.stdout)
            estimated = estimate(path, n_ctx, 2).total
            print(
                f"| {path.stem} | {n_ctx:,} | {estimated / 1e6:,.0f} | {measured / 1e6:,.0f} | "
                f"{estimated / measured - 1:+.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
