"""Usage: python run.py [--only CLIENT]... [MODEL]; see scripts/try_clients.

Starts the server, runs the trials of trials.py, trials.mjs and browser.html against it, and prints what
came of them as a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = os.environ["AMULET_PYTHON"]
#: No library asks anybody but the server, or tells anybody of it.
QUIET = {
    "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "1", "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_OFFLINE": "1", "LANGCHAIN_TRACING_V2": "false", "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "AI_SDK_LOG_WARNINGS": "false",
    "OPENAI_AGENTS_DISABLE_TRACING": "1", "OTEL_SDK_DISABLED": "true", "VERCEL_TELEMETRY_DISABLED": "1",
    "OPENAI_API_KEY": "none", "LOGFIRE_IGNORE_NO_CONFIG": "1",
}  # fmt: skip


class Files(SimpleHTTPRequestHandler):
    """What a page is made of, from another origin than the server's."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serve_files(folder: Path) -> str:
    """Return the origin from which a folder is served, as long as this process runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


def results(command: list[str], only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what a file of trials writes: a line of JSON for each of them."""
    with subprocess.Popen([*command, *only], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"client"'):  # libraries write what they like
                found = json.loads(line)
                print(f"{found['client']}: {found['trial']}: {found['result']}", file=sys.stderr)
                yield found
    if process.returncode:
        yield {"client": command[1], "version": "", "trial": "all", "result": "it broke off"}


def row(found: list[dict[str, Any]]) -> str:
    """Return the row of a client: what passed, and what did not with the reason."""
    passed = ", ".join(each["trial"] for each in found if each["result"] == "passed")
    others: dict[str, list[str]] = {}
    for each in found:
        if each["result"] != "passed":
            others.setdefault(each["result"].replace("|", "/"), []).append(each["trial"])
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in others.items())
    return f"| {found[0]['client']} {found[0]['version']} | {passed} | {reasons} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/try_clients")
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--only", action="append", default=[], metavar="CLIENT")
    options = parser.parse_args()
    os.environ.update(QUIET)
    more = [] if options.model is None else ["--model", options.model]
    modules = os.environ.get("TRIALS_MODULES")
    pages = None if modules is None else serve_files(Path(modules))
    if pages is not None:
        more += ["--allow-origin", pages]
    serve = ["serve", "--port", "0", "--ready-json", "--exit-with-parent", "--log-level", "warning"]
    server = subprocess.Popen(
        [PYTHON, "-m", "amulet_gguf", *serve, "--limit-tokens", "300", *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    ready = server.stdout.readline()
    if not ready:
        sys.exit(1)
    url = json.loads(ready)["url"]
    while not is_ready(url):
        if server.poll() is not None:
            sys.exit(1)
        time.sleep(0.2)

    found: dict[str, list[dict[str, Any]]] = {}
    commands = [[sys.executable, str(HERE / "trials.py"), url, options.model or ""]]
    if modules is not None and pages is not None:
        commands.append(["node", str(Path(modules, "trials.mjs")), url])
        commands.append([PYTHON, str(HERE / "browser.py"), pages, url])
    for command in commands:
        for each in results(command, options.only):
            found.setdefault(each["client"], []).append(each)
    server.terminate()
    print(f"Served: {json.loads(ready)['model']}\n\n| client | passed | did not |\n|---|---|---|")
    for rows in found.values():
        print(row(rows))
    # What a small model is too small for is told, but no failure.
    everything = [each["result"] for rows in found.values() for each in rows]
    sys.exit(not all(result.startswith(("passed", "the model ")) for result in everything))


if __name__ == "__main__":
    main()
