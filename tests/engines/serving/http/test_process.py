"""``qie serve`` as a process: its address, its end by a signal, and who may ask it."""

import json
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import pytest

from qie.engines.inputs.image import encode_image
from tests.support.images import smooth_image
from tests.support.servers import Process, serving_process

FILE = ("cat.png", encode_image(smooth_image(150, 90, seed=1), ".png"), "image/png")


def asking(server: Process, answers: list[Any], **fields: str) -> threading.Thread:
    """Ask for an edit in a thread; returns when the first byte of a stream is there."""
    begun = threading.Event()

    def ask() -> None:
        form = {"prompt": "make it red", "stream": "true", "steps": "60", **fields}
        with (
            httpx.Client(timeout=60) as http,
            http.stream("POST", f"{server.url}/v1/images/edits", data=form, files={"image": FILE}) as response,
        ):
            for line in response.iter_lines():
                begun.set()
                answers.append(line)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(60)
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_edit_that_runs_be_completed(bundle: Path, number: signal.Signals) -> None:
    answers: list[str] = []
    with serving_process(bundle) as server:
        thread = asking(server, answers)
        server.process.send_signal(number)
        thread.join(60)
        code, log = server.ended()
    last = json.loads(answers[-2 if not answers[-1] else -1].removeprefix("data: "))
    assert last["type"] == "image_edit.completed"
    assert code == 128 + number
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [(line["outcome"], line["status"]) for line in lines] == [("done", 200)]
    assert "Traceback" not in log


def test_a_port_that_is_taken(bundle: Path, process: Callable[..., CompletedProcess[str]], refusal: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        says = refusal(process("serve", bundle, "--port", str(taken.getsockname()[1])))
    assert "cannot be listened on (Address already in use)" in says


def test_on_this_machine_alone_it_answers_to_no_other_name(bundle: Path) -> None:
    with serving_process(bundle, "--allow-host", "edits.example") as server, httpx.Client(base_url=server.url) as http:
        port = server.url.rpartition(":")[2]
        statuses = {
            name: http.get("/v1/models", headers={"Host": name}).status_code
            for name in (f"127.0.0.1:{port}", f"localhost:{port}", "edits.example", f"evil.example:{port}", "")
        }
        assert list(statuses.values()) == [200, 200, 200, 403, 403], statuses
