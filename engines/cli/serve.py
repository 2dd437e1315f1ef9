"""``qie serve``: edits over HTTP, in the form of OpenAI's API, and a page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qie.engines.backends import installed
from qie.engines.cli.options import DeviceOption
from qie.engines.errors import BackendMissingError, RequestError
from qie.engines.terminal import say

__all__ = ["KEYS", "serve"]

KEYS = "QIE_API_KEYS"
"""Environment variable with the API keys, separated by commas."""


def serve(
    bundle: Annotated[
        str | None,
        typer.Argument(metavar="BUNDLE", help="Name or folder of a bundle.", show_default="the newest that runs here"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    keys: Annotated[
        Path | None,
        typer.Option("--api-keys", metavar="FILE", help="File with API keys, one a line.", show_default=f"${KEYS}"),
    ] = None,
    waiting: Annotated[int, typer.Option(min=1, help="Images that may wait; more are refused.")] = 64,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images that take a step together.", show_default="the bundle's largest")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 600,
    max_mib: Annotated[int, typer.Option("--max-mib", min=1, help="Size of a request in MiB.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, max=178, help="Size of an image in megapixels.")] = 64,
    allow_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="Name by which clients may ask, besides those of this machine; repeat it for several.",
            show_default="every name where HOST is not this machine alone",
        ),
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    device: DeviceOption = None,
) -> None:
    """Serve edits over HTTP, and a page.

    Requests of one shape take their steps together. The log, one JSON object a line, goes to stderr. Ctrl-C and SIGTERM
    complete what runs.
    """
    if not installed("fastapi") or not installed("uvicorn") or not installed("prometheus_client"):
        raise BackendMissingError("the server is not installed; run `pip install 'qie[serve]'`")
    api_keys = _keys(keys)

    import logging

    from qie.engines.editing.editor import Editor
    from qie.engines.serving.http.app import Options, create_app
    from qie.engines.serving.http.fields import Limits
    from qie.engines.serving.http.guard import LOOPBACK
    from qie.engines.serving.http.metrics import Metrics
    from qie.engines.serving.http.server import listen, server
    from qie.engines.serving.service import Service

    socket = listen(host, port)
    editor = Editor(bundle, device=device)
    alone = host in ("127.0.0.1", "::1", "localhost")
    hosts = (*LOOPBACK, *(allow_hosts or ())) if alone or allow_hosts else ()

    def start(metrics: Metrics) -> Service:
        return Service(editor, batch_max=batch, waiting_max=waiting, on_step=metrics.step)

    limits = Limits(body_bytes=max_mib << 20, pixels=max_megapixels * 1_000_000)
    app = create_app(
        start, Options(keys=api_keys, hosts=hosts, limits=limits, timeout=timeout, log_prompts=log_prompts)
    )
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not api_keys and not alone:
        say(f"note: everybody who reaches {host} can use this server; give API keys with --api-keys", err=True)
    address = f"[{host}]" if ":" in host else host
    name = f"{editor.model.name} ({editor.bundle.name})"
    say(f"{name} at http://{address}:{socket.getsockname()[1]}, Ctrl-C ends it", err=True)
    server(app).run(sockets=[socket])


def _keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of the file, or of the environment.

    Raises:
        RequestError: the file cannot be read or holds none.
    """
    if file is None:
        return tuple(filter(None, (key.strip() for key in os.environ.get(KEYS, "").split(","))))
    try:
        keys = tuple(filter(None, (line.strip() for line in file.read_text().splitlines())))
    except (OSError, ValueError) as problem:
        raise RequestError(
            f"{file} cannot be read ({problem}); give a file with a key a line", option="api_keys"
        ) from None
    if not keys:
        raise RequestError(f"{file} holds no key; give a file with a key a line", option="api_keys")
    return keys
