"""A real server of vLLM, started with the bundle's own script, against the graphs with onnxruntime."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qie.compiler.metrics.error import psnr_db
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import EngineError
from tests.support.repository import ROOT
from tests.vllm.conftest import Inputs, relative

STARTS = 300.0
"""Seconds in which a server is up: 80 on 2 cores of an AMD EPYC."""

Measured = Callable[[str], None]


@pytest.fixture(scope="module")
def url(with_vllm: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = ["sh", str(with_vllm.path / "text_encoder.vllm/serve.sh"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True) as server,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(server, address, log)
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _wait(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    end = time.monotonic() + STARTS
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_numbers_are_those_of_the_graph(
    images: int, url: str, plain: Stages, inputs: Inputs, measured: Measured
) -> None:
    vision, prompts = inputs(images)
    embeds = plain.vision(vision)
    expected = plain.language(prompts, embeds)
    stages = Stages(plain.bundle, vllm_url=url)
    stages.language(prompts, embeds)
    start = time.perf_counter()
    found = stages.language(prompts, embeds)
    seconds = (time.perf_counter() - start) / len(prompts)
    errors = [relative(one, other) for one, other in zip(found, expected, strict=True)]
    largest = max(float(np.abs(one - other).max()) for one, other in zip(found, expected, strict=True))
    measured(f"relative L2 {max(errors):.1e}, largest difference {largest:.1e}, {1e3 * seconds:.0f} ms a prompt")
    assert max(errors) < 1e-4 and largest < 1e-3


def test_an_edit_equals_that_of_the_graphs(url: str, pocket_bundle: Path, measured: Measured) -> None:
    image = Image.open(ROOT / "docs/images/cat.jpg").convert("RGB")
    request = Request(images=[image], instructions=["tint it purple"], seeds=[1], guidance=2.0)
    results = []
    for server in (None, url):
        with Editor(open_bundle(pocket_bundle), vllm_url=server) as editor:
            results.append(np.asarray(editor.edit(request).images[0]))
    found = psnr_db(results[1], results[0])
    measured(f"PSNR {found:.1f} dB, {(results[0] != results[1]).mean():.2%} of the values differ")
    assert found > 50


def test_a_server_of_another_model_is_refused(url: str, bundle: Path) -> None:
    image = Image.open(ROOT / "docs/images/cat.jpg").convert("RGB")
    with (
        Editor(open_bundle(bundle), vllm_url=url) as editor,
        pytest.raises(EngineError, match="makes other tokens of the prompt than the tokenizer of the bundle"),
    ):
        editor.edit(Request(images=[image], instructions=["tint it purple"], seeds=[1], steps=1))
