"""Servers of the application on a free port of this machine: in a thread of this process, or in one of their own."""

import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qie.engines.editing.editor import Editor
from qie.engines.serving.http.app import Options, create_app
from qie.engines.serving.http.metrics import Metrics
from qie.engines.serving.http.server import server as http_server
from qie.engines.serving.service import Service

__all__ = ["Process", "Server", "serving", "serving_process"]


class Server:
    """A running server.

    Attributes:
        url: where it listens.
        service: the service behind it.
    """

    def __init__(self, url: str, service: Service) -> None:
        self.url, self.service = url, service


@contextmanager
def serving(bundle: Path, *, options: Options | None = None, **service: Any) -> Iterator[Server]:
    """Serve ``bundle`` with these options of ``Service``."""
    started: list[Service] = []

    def start(metrics: Metrics) -> Service:
        started.append(Service(Editor(bundle, residency="resident"), on_step=metrics.step, **service))
        return started[0]

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = http_server(create_app(start, options or Options()))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", started[0])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"


class Process:
    """A running ``qie serve``.

    Attributes:
        url: where it listens.
        process: itself.
    """

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.url, self.process, self._log = url, process, log

    def ended(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for its end: the exit code, and what it wrote."""
        return self.process.wait(seconds), self._log.read_text(encoding="utf-8")


@contextmanager
def serving_process(bundle: Path, *words: str) -> Iterator[Process]:
    """``qie serve`` with these options; it is killed in the end where it still runs."""
    command = [sys.executable, "-c", "from qie.compiler.cli.main import main; main()", "serve", str(bundle)]
    with tempfile.TemporaryDirectory(prefix="serve-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:  # a pipe that nobody reads would stop the server
            process = subprocess.Popen([*command, "--port", "0", *words], stderr=file)
        try:
            while (found := re.search(r"http://\S+:\d+", log.read_text(encoding="utf-8"))) is None:
                assert process.poll() is None, log.read_text(encoding="utf-8")
                time.sleep(0.02)
            yield Process(found[0], process, log)
        finally:
            process.kill()
            process.wait()
