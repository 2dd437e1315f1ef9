"""The API over HTTP: the official client, raw requests, streams, errors, and clients that leave."""

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.inputs.image import encode_image
from qie.engines.serving.http.app import Options
from qie.engines.serving.http.fields import Limits
from tests.support.images import smooth_image
from tests.support.servers import Server, serving

CAT = smooth_image(150, 90, seed=1)
FILE = ("cat.png", encode_image(CAT, ".png"), "image/png")
FORM = {"prompt": "make it red", "seed": "3", "steps": "3"}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def expected(bundle: Path) -> np.ndarray:
    """The pixels of ``FORM`` by the editor."""
    with Editor(bundle) as editor:
        request = Request(images=[CAT], instructions=["make it red"], seeds=[3], steps=3)
        return np.asarray(editor.edit(request).images[0])


def pixels(content: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def edit(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/images/edits", data=FORM | fields, files={"image": FILE})


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    return body["error"]


def test_a_form_gets_the_bytes_of_the_editor(http: httpx.Client, expected: np.ndarray) -> None:
    body = edit(http).raise_for_status().json()
    assert np.array_equal(pixels(body["data"][0]["b64_json"]), expected)
    assert body["data"][0]["seed"] == 3
    assert (body["size"], body["output_format"], body["background"], body["steps"]) == (
        f"{expected.shape[1]}x{expected.shape[0]}", "png", "opaque", 3,
    )  # fmt: skip


def test_the_official_client_gets_them_too(server: Server, expected: np.ndarray) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.edit(
            image=FILE, prompt="make it red", n=2, extra_body={"seed": 3, "steps": 3}, response_format="b64_json"
        )
        assert answer.data is not None
        assert np.array_equal(pixels(answer.data[0].b64_json or ""), expected)
        assert len(answer.data) == 2
        assert client.models.list().data[0].id == server.service.editor.bundle.name
        with pytest.raises(openai.BadRequestError, match="does not do masks"):
            client.images.edit(image=FILE, prompt="make it red", mask=FILE)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-image-1'"):
            client.images.edit(image=FILE, prompt="make it red", model="gpt-image-1")


def test_the_official_client_streams(server: Server, expected: np.ndarray) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.images.edit(
            image=[FILE], prompt="make it red", stream=True, partial_images=2, extra_body={"seed": 3, "steps": 3}
        )
        events: list[Any] = list(stream)
    partial = [event for event in events if event.type == "image_edit.partial_image"]
    completed = [event for event in events if event.type == "image_edit.completed"]
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert all(pixels(event.b64_json).shape == expected.shape for event in partial)
    assert [np.array_equal(pixels(event.b64_json), expected) for event in completed] == [True]


def test_json_with_data_urls(http: httpx.Client, expected: np.ndarray) -> None:
    url = f"data:image/png;base64,{base64.b64encode(FILE[1]).decode()}"
    body = {"images": [{"image_url": url}], "prompt": "make it red", "seed": 3, "steps": 3}
    answer = http.post("/v1/images/edits", json=body).raise_for_status().json()
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), expected)


def test_a_stream_begins_at_once_and_tells_every_step(http: httpx.Client, expected: np.ndarray) -> None:
    with http.stream("POST", "/v1/images/edits", data=FORM | {"stream": "true"}, files={"image": FILE}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[0] == ": accepted"
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [(d["step"], d["steps"]) for d in data if d["type"] == "image_edit.step"] == [(1, 3), (2, 3), (3, 3)]
    assert np.array_equal(pixels(data[-1]["b64_json"]), expected)


def test_other_formats(http: httpx.Client) -> None:
    for name, kind in (("jpeg", "JPEG"), ("webp", "WEBP")):
        small, large = (
            base64.b64decode(edit(http, output_format=name, output_compression=q).json()["data"][0]["b64_json"])
            for q in ("5", "95")
        )
        assert Image.open(io.BytesIO(small)).format == kind
        assert len(small) < len(large)


@pytest.mark.parametrize(
    ("fields", "status", "says", "param"),
    [
        ({"prompt": ""}, 400, "there is no prompt", "prompt"),
        ({"prompt": "  "}, 400, "the instruction is empty", "instructions"),
        ({"size": "0x0"}, 400, "not positive", "size"),
        ({"steps": "1001"}, 400, "from 1 to 1000", "steps"),
        ({"guidance": "nan"}, 400, "guidance scale", "guidance"),
        ({"model": "other"}, 404, "there is no model 'other'", "model"),
        ({"colour": "red"}, 400, "there is no field 'colour'", None),
    ],
)
def test_a_refusal_is_one_sentence(
    http: httpx.Client, fields: dict[str, str], status: int, says: str, param: str
) -> None:
    found = error(edit(http, **fields), status)
    assert says in found["message"]
    assert found["param"] == param


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"{}", "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 400),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=a", 400),
        (b"--a\r\nContent-Disposition: form-data\r\n\r\nx\r\n--a--", "multipart/form-data; boundary=a", 400),
        (b"x", "text/plain", 400),
        (b"x", "", 400),
    ],
)
def test_a_body_that_is_no_request(http: httpx.Client, content: bytes, kind: str, status: int) -> None:
    error(http.post("/v1/images/edits", content=content, headers={"content-type": kind}), status)


def test_other_paths_and_methods(http: httpx.Client) -> None:
    error(http.get("/v1/images/edits"), 405)
    error(http.get("/v1/nothing"), 404)
    error(http.get("/v1/models/other"), 404)
    assert http.get(f"/v1/models/{http.get('/v1/models').json()['data'][0]['id']}").status_code == 200


def test_a_body_that_is_too_long_is_not_read(bundle: Path) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65536

    options = Options(limits=Limits(body_bytes=1 << 20))
    with serving(bundle, options=options) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        error(
            http.post("/v1/images/edits", content=b"x" * (1 << 21), headers={"content-type": "application/json"}), 413
        )
        with suppress(httpx.WriteError):  # where the server has closed the connection meanwhile
            error(http.post("/v1/images/edits", content=endless(), headers={"content-type": "application/json"}), 413)
        assert edit(http).status_code == 200


def test_keys(bundle: Path) -> None:
    with serving(bundle, options=Options(keys=("one", "two"))) as server, httpx.Client(base_url=server.url) as http:
        assert error(edit(http), 401)["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"Authorization": "Bearer three"}).status_code == 401
        assert http.get("/v1/models", headers={"Authorization": "bearer two"}).status_code == 200
        assert http.get("/healthz").status_code == http.get("/readyz").status_code == http.get("/").status_code == 200


def test_requests_at_the_same_time_have_the_bytes_of_requests_alone(http: httpx.Client, expected: np.ndarray) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: edit(http, seed=str(seed)), [3, 4, 5, 3, 6, 7, 3, 8]))
    found = [pixels(answer.raise_for_status().json()["data"][0]["b64_json"]) for answer in answers]
    assert [np.array_equal(image, expected) for image in found] == [True, False, False, True, False, False, True, False]


def test_a_full_queue_is_429_with_a_time(bundle: Path) -> None:
    with (
        serving(bundle, batch_max=1, running_max=1, waiting_max=1) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(lambda seed: edit(http, seed=str(seed), steps="20"), range(6)))
        assert {answer.status_code for answer in answers} == {200, 429}
        busy = next(answer for answer in answers if answer.status_code == 429)
        assert error(busy, 429)["code"] == "rate_limit_exceeded"
        assert int(busy.headers["retry-after"]) >= 1
        assert 'qie_requests_total{outcome="busy"}' in http.get("/metrics").text


def test_a_client_that_leaves_frees_its_place(server: Server, http: httpx.Client, expected: np.ndarray) -> None:
    for stream in ("true", "false"):
        data = FORM | {"steps": "1000", "stream": stream}
        with (
            suppress(httpx.ReadTimeout),
            http.stream("POST", "/v1/images/edits", data=data, files={"image": FILE}, timeout=0.2) as answer,
        ):
            assert next(answer.iter_bytes())
            assert stream == "true", "the edit was done before the client left"
        deadline = time.monotonic() + 30
        while server.service.running + server.service.waiting and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.service.running + server.service.waiting == 0
    assert np.array_equal(pixels(edit(http).json()["data"][0]["b64_json"]), expected)


def test_a_late_edit_is_504(bundle: Path) -> None:
    with (
        serving(bundle, options=Options(timeout=0.05)) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        assert "not done within its time" in error(edit(http, steps="900"), 504)["message"]


def test_a_server_that_ends_completes_what_it_accepted(bundle: Path, expected: np.ndarray) -> None:
    answers: list[httpx.Response] = []
    with serving(bundle) as server:

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                answers.append(edit(http))

        asking = threading.Thread(target=ask)
        asking.start()
        while not server.service.running:
            time.sleep(0.005)
    asking.join(60)
    assert np.array_equal(pixels(answers[0].raise_for_status().json()["data"][0]["b64_json"]), expected)


def test_metrics_count(http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].rpartition(" ")[2])

    done, refused, images, steps = (
        value(name)
        for name in (
            'qie_requests_total{outcome="done"}',
            'qie_requests_total{outcome="refused"}',
            "qie_images_total",
            "qie_step_seconds_count",
        )
    )
    edit(http, n="2")
    edit(http, n="0")
    assert value('qie_requests_total{outcome="done"}') == done + 1
    assert value('qie_requests_total{outcome="refused"}') == refused + 1
    assert value("qie_images_total") == images + 2
    assert steps + 3 <= value("qie_step_seconds_count") <= steps + 6
    assert value("qie_waiting_images") == value("qie_running_images") == 0


def test_the_log_has_neither_prompts_nor_images(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "qie.serving"):
        edit(http, prompt="a secret wish")
        edit(http, prompt="another secret", steps="0")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "qie.serving.http"]
    assert [line["outcome"] for line in lines] == ["done", "refused"]
    assert "secret" not in caplog.text


def test_the_page_takes_nothing_from_elsewhere(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("page.css", "page.js", "icon.svg"):
        assert f'static/{name}"' in page.text
        assert http.get(f"/static/{name}").status_code == 200
