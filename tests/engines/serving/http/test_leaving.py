"""200 clients that leave at a random step: nothing of theirs goes on, and the next request is right."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from qie.engines.inputs.image import encode_image
from tests.support.images import smooth_image
from tests.support.servers import serving
from tests.support.soak import attempts

FILE = ("cat.png", encode_image(smooth_image(150, 90, seed=1), ".png"), "image/png")
STEPS = 12


def test_clients_that_leave_at_a_random_step(bundle: Path) -> None:
    clients = attempts(16, 200)
    steps = random.Random(1)
    leaving = [(number, steps.randrange(STEPS), steps.random() < 0.5) for number in range(clients)]
    with serving(bundle, waiting_max=clients) as server, httpx.Client(base_url=server.url, timeout=120) as http:

        def ask(seed: int, *, stream: bool, timeout: float = 120.0, until: int | None = None) -> httpx.Response:
            form = {"prompt": "make it red", "seed": str(seed), "steps": str(STEPS), "stream": str(stream).lower()}
            with httpx.Client(base_url=server.url, timeout=timeout) as own:
                if until is None:
                    return own.post("/v1/images/edits", data=form, files={"image": FILE})
                with own.stream("POST", "/v1/images/edits", data=form, files={"image": FILE}) as response:
                    taken = 0
                    for line in response.iter_lines():
                        taken += line.startswith("event: image_edit.step")
                        if taken > until:
                            break
                    return response

        def leave(seed: int, step: int, stream: bool) -> bool:
            if stream:
                return ask(seed, stream=True, until=step).status_code == 200
            try:
                ask(seed, stream=False, timeout=0.05 * (step + 1))
            except httpx.TimeoutException:
                return True
            return False

        expected = ask(3, stream=False).json()["data"]
        with ThreadPoolExecutor(8) as pool:
            left = list(pool.map(lambda one: leave(*one), leaving))
        deadline = time.monotonic() + 60
        while server.service.running + server.service.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert left.count(True) >= clients // 2
        assert ask(3, stream=False).json()["data"] == expected
        metrics = http.get("/metrics").text
        assert 'qie_requests_total{outcome="failed"} 0.0' in metrics


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_leaves_while_its_edit_waits(bundle: Path, stream: str) -> None:
    form = {"prompt": "make it red", "seed": "3", "steps": "300", "stream": stream}
    with serving(bundle, running_max=1, batch_max=1) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"{server.url}/v1/images/edits", data=form, files={"image": FILE}, timeout=120)
        while not server.service.running:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/images/edits", data=form, files={"image": FILE}, timeout=0.3)
        deadline = time.monotonic() + 60
        while server.service.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert first.result().status_code == 200
