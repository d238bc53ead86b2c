"""`amulet serve`: the model behind HTTP."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

import click

from amulet_gguf.cli.options import (
    loading_from,
    loading_options,
    settings_from,
    settings_options,
)
from amulet_gguf.cli.terminal import echo, echo_json, prepare_streams
from amulet_gguf.errors import SettingError


@click.command()
@settings_options
@loading_options
@click.option(
    "--host",
    multiple=True,
    default=["127.0.0.1"],
    show_default=True,
    help="Address to listen on. Repeatable, as for 127.0.0.1 and ::1.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any.")
@click.option(
    "--api-key",
    envvar="AMULET_API_KEY",
    help="Key that requests must carry; needed where others can reach the address. Better given as "
    "AMULET_API_KEY: other users of the machine can see arguments.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Answers with one preference each that are written at once; the memory for them is taken "
    "at the start.",
)
@click.option(
    "--queue",
    type=click.IntRange(1, 1024),
    default=64,
    show_default=True,
    help="Answers that may wait; more are refused with 503.",
)
@click.option(
    "--limit-tokens",
    type=click.IntRange(1, 1_000_000),
    default=4096,
    show_default=True,
    help="Longest answer that a request gets.",
)
@click.option(
    "--strict-model", is_flag=True, help="Refuse requests that name another model than the served one."
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Name the server may be called by, as *.localhost. Repeatable.",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="URL",
    help="Origin of pages that may ask, such as http://localhost:5173. Repeatable.",
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["page", "metrics", "slots"]),
    help="Part of the server that is not to be there. Repeatable.",
)
@click.option(
    "--ready-json",
    is_flag=True,
    help="Write one line to stdout when the server listens: JSON with url, port, model and pid. The "
    "model is loaded when /health says 200.",
)
@click.option(
    "--exit-with-parent",
    is_flag=True,
    help="End when the process that started this one is gone, or when stdin, if it is a pipe, is "
    "closed. A terminal, a file, /dev/null, or no stdin: only the process is watched.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged; requests are at info. Lines that nobody reads in time are lost.",
)
@click.option(
    "--log-file",
    type=click.Path(dir_okay=False),
    help="Append the log to this file.  [default: stderr]",
)
def serve(
    host: tuple[str, ...],
    port: int,
    api_key: str | None,
    parallel: int,
    queue: int,
    limit_tokens: int,
    strict_model: bool,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    without: tuple[str, ...],
    ready_json: bool,
    exit_with_parent: bool,
    log_level: str,
    log_file: str | None,
    **options: Any,
) -> None:
    """Answer programs that speak the OpenAI API, and a page at / for people.

    Preferences and sampling options are where requests start from; what a request says goes before.

    \b
    amulet serve --prefer concise
    curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    from amulet_gguf.server.ending import Ending, watch_parent

    ending = Ending()
    if exit_with_parent:
        watch_parent(ending.begin)  # first: who is gone by now is not missed
    loading, settings = loading_from(options), settings_from(options)
    try:
        from amulet_gguf.server.app import create_app
        from amulet_gguf.server.guard import Access
        from amulet_gguf.server.logs import begin_logging
        from amulet_gguf.server.run import listening, make_server
        from amulet_gguf.server.served import Served
        from amulet_gguf.server.starting import Starting
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is missing: {sys.executable} -m pip install 'amulet-gguf[server]'"
        ) from None
    from amulet_gguf.cli.bar import LateBar
    from amulet_gguf.home.config import load_config
    from amulet_gguf.models.find import find_model
    from amulet_gguf.service.service import AmuletService

    n_sequences = parallel * 2
    if settings.n_branches > n_sequences:
        raise SettingError(f"{len(settings.prefer)} preferences need a larger --parallel")
    access = Access(host, api_key or None, allow_host, allow_origin)
    config = load_config()
    failures: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        listeners = stack.enter_context(listening(access, port))  # before a model is loaded for nothing
        path = find_model(loading.model)
        asked = str(loading.model or ".gguf")
        is_name = not asked.endswith(".gguf") and os.sep not in asked
        name = asked if is_name else path.stem.lower()
        shown = f"[{host[0]}]" if ":" in host[0] else host[0]
        port = listeners[0].getsockname()[1]
        url = f"http://{shown}:{port}"
        drain = begin_logging(log_level, log_file)
        prepare_streams()  # stderr is another one now
        bar = stack.enter_context(LateBar("Loading the model"))
        starting = Starting(access)

        def on_load(fraction: float) -> None:
            starting.progress = fraction
            bar.update(fraction, 1.0)

        def on_ready() -> None:
            if ready_json:
                about = {"url": url, "port": port, "model": name, "pid": os.getpid()}
                with contextlib.suppress(OSError):  # who closed stdout does not want to know
                    echo_json(about)

        def on_exit() -> None:  # ends what is under way with an error that says why
            bar.close()
            threading.Thread(target=service.close, daemon=True).start()

        def open_up() -> None:
            try:
                service.wait_ready()
                bar.close()
                served = Served(service, name, settings, config, limit_tokens, n_sequences, strict_model)
                starting.app = create_app(served, access, without)
                echo(f"{name} at {url} (Ctrl-C ends; OpenAI's API at {url}/v1)", err=True)
            except BaseException as error:
                failures.append(error)
                server.should_exit = True

        server = make_server(starting, on_ready, on_exit)
        ending.catch_signals(server)
        service = stack.enter_context(
            AmuletService(
                path, max_waiting=queue, n_sequences=n_sequences, on_load=on_load, **loading.options
            )
        )
        threading.Thread(target=open_up, name="amulet-opening", daemon=True).start()
        server.run(sockets=listeners)
    drain()
    ending.finish()
    if failures and not ending.is_begun:
        raise failures[0]
