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
from amulet_gguf.errors import SettingError


@click.command()
@settings_options
@loading_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
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
def serve(
    host: str,
    port: int,
    api_key: str | None,
    parallel: int,
    queue: int,
    limit_tokens: int,
    strict_model: bool,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    **options: Any,
) -> None:
    """Answer programs that speak the OpenAI API, and a page at / for people.

    Preferences and sampling options are where requests start from; what a request says goes before.

    \b
    amulet serve --prefer concise
    curl localhost:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    loading, settings = loading_from(options), settings_from(options)
    try:
        from amulet_gguf.server.app import create_app
        from amulet_gguf.server.guard import Access
        from amulet_gguf.server.run import listen, make_server
        from amulet_gguf.server.served import Served
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"{error.name} is missing: pip install 'amulet-gguf[server]'"
        ) from None
    from amulet_gguf.cli.terminal import LateBar
    from amulet_gguf.home.config import load_config
    from amulet_gguf.service.service import AmuletService

    n_sequences = parallel * 2
    if settings.n_branches > n_sequences:
        raise SettingError(f"{len(settings.prefer)} preferences need a larger --parallel")
    access = Access(host, api_key or None, allow_host, allow_origin)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(access, port))  # before the model is loaded for nothing
        bar = stack.enter_context(LateBar("Loading the model"))
        service = stack.enter_context(
            AmuletService(
                loading.model,
                max_waiting=queue,
                n_sequences=n_sequences,
                on_load=lambda fraction: bar.update(fraction, 1.0),
                **loading.options,
            )
        )
        path = service.wait_ready().model.path
        bar.close()
        asked = str(loading.model or ".gguf")
        is_name = not asked.endswith(".gguf") and os.sep not in asked
        name = asked if is_name else path.stem.lower()
        served = Served(service, name, settings, load_config(), limit_tokens, n_sequences, strict_model)
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        import logging

        logging.basicConfig(
            level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
        )
        logging.getLogger("amulet_gguf.server").setLevel(logging.INFO)
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # the guard tells of failures
        make_server(
            create_app(served, access),
            lambda: click.echo(f"{name} at {url} (Ctrl-C ends; OpenAI's API at {url}/v1)", err=True),
            # Ends what is under way with an error that says why.
            on_exit=lambda: threading.Thread(target=service.close).start(),
        ).run(sockets=[listener])
