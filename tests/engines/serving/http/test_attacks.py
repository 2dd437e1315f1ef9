"""Attacks over HTTP: every answer is an error of the API in one sentence, and the next request is right."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from qie.engines.inputs.image import encode_image
from qie.engines.serving.http.app import Options
from qie.engines.serving.http.fields import Limits
from tests.support.images import smooth_image
from tests.support.servers import Server, serving

PNG = encode_image(smooth_image(150, 90, seed=1), ".png")
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
FORM = {"prompt": "make it red", "seed": "3", "steps": "1"}
EDITS = "/v1/images/edits"


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    limits = Limits(body_bytes=1 << 20, pixels=1_000_000)
    with serving(bundle, options=Options(limits=limits, pause=1.0, keys=("key", "ключ"))) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": "Bearer key"}) as http:
        yield http
        assert http.post(EDITS, data=FORM, files={"image": PNG}).status_code == 200


def says(response: httpx.Response, status: int = 400) -> str:
    """The sentence of an error."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    message: str = response.json()["error"]["message"]
    assert "\n" not in message and len(message) < 600
    return message


def talk(server: Server, *parts: bytes) -> bytes:
    """Send bytes over a connection: everything that comes back until it is closed."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        answer = b""
        with suppress(ConnectionResetError, BrokenPipeError):  # the server has closed what was not read to its end
            for part in parts:
                connection.sendall(part)
            while received := connection.recv(65536):
                answer += received
    return answer


def head(*lines: str, method: str = "POST", path: str = EDITS) -> bytes:
    """The head of a request."""
    common = ("Host: x", "Authorization: Bearer key", "Connection: close")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *common, *lines, "", ""]).encode()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes with so many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * width)
    data = b"".join(packer.compress(row) for _ in range(min(height, 2000))) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def test_a_body_that_comes_too_slowly(server: Server, http: httpx.Client) -> None:
    answer = talk(server, head("Content-Type: application/json", "Content-Length: 1000"), b"{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"does not arrive in time" in answer


def test_a_length_that_is_wrong(server: Server, http: httpx.Client) -> None:
    short = talk(server, head("Content-Type: application/json", "Content-Length: 2"), b"{}xx")
    assert short.startswith(b"HTTP/1.1 400")
    for length in ("-1", "x", "1, 2", "99999999999999999999999"):
        answer = talk(server, head("Content-Type: application/json", f"Content-Length: {length}"), b"{}")
        assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 413"), answer
        assert b"Traceback" not in answer
    both = talk(
        server,
        head("Content-Type: application/json", "Content-Length: 2", "Transfer-Encoding: chunked"),
        b"2\r\n{}\r\n0\r\n\r\n",
    )
    assert both.startswith(b"HTTP/1.1 400")


def test_chunks_beyond_the_limit(server: Server, http: httpx.Client) -> None:
    chunks = (b"40000\r\n" + b"x" * 0x40000 + b"\r\n") * 8 + b"0\r\n\r\n"
    answer = talk(server, head("Content-Type: application/json", "Transfer-Encoding: chunked"), chunks)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"has more than 1 MiB; send smaller images" in answer


def test_heads_that_are_too_large(server: Server, http: httpx.Client) -> None:
    for lines in ([f"X-A: {'a' * 200_000}"], [f"X-{number}: a" for number in range(20_000)]):
        answer = talk(server, head(*lines))
        assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 431")


def test_a_connection_that_asks_for_nothing_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qie.engines.serving.http.server.HEAD_SECONDS", 0.3)
    assert talk(server) == b""
    assert talk(server, b"POST /v1/images/edits HT") == b""
    again = talk(server, head(path="/healthz", method="GET").replace(b"Connection: close\r\n", b""), b"GET /he")
    assert again.startswith(b"HTTP/1.1 200") and again.count(b"HTTP/1.1") == 1


def test_many_fields(http: httpx.Client) -> None:
    many = {f"a{number}": "x" for number in range(10_000)}
    assert "Too many fields" in says(http.post(EDITS, data=many))
    assert "Too many" in says(http.post(EDITS, data=many, files={"image": PNG}))
    assert "there is no field" in says(http.post(EDITS, json=many))
    files = [("image", b"x")] * 60
    assert "60 images were given, expected one to 3" in says(http.post(EDITS, data=FORM, files=files))
    assert "1,000,000 characters" in says(http.post(EDITS, data={"prompt": "x" * 1_000_000}, files={"image": b"x"}))


@pytest.mark.parametrize("name", ["prompt", "n", "seed", "model", "stream", "guidance"])
def test_a_field_that_is_twice_there(http: httpx.Client, name: str) -> None:
    message = says(http.post(EDITS, data={**FORM, name: ["1", "1"]}, files={"image": PNG}))
    assert message == f"{name} is given twice; give it once"
    body = f'{{"image": "{URL}", "{name}": "1", "{name}": "1"}}'
    answer = http.post(EDITS, content=body, headers={"content-type": "application/json"})
    assert says(answer) == f"'{name}' is given twice; give it once"


def test_fields_in_the_address(http: httpx.Client) -> None:
    assert "parameters behind a question mark" in says(http.post(f"{EDITS}?n=2", data=FORM, files={"image": PNG}))


@pytest.mark.parametrize(
    "body",
    [
        '{"image":' + "[" * 100_000,
        '{"image":' + '{"image_url":' * 1000 + '"x"' + "}" * 1001,
        '{"image":' + "[" * 500 + "]" * 500 + "}",
        '{"prompt": ' + "9" * 5000 + "}",
        '{"n": 1e400}',
        "[]",
        "null",
        '"x"',
        "\ufeff{}",
    ],
)
def test_json_that_is_no_request(http: httpx.Client, body: str) -> None:
    says(http.post(EDITS, content=body.encode(), headers={"content-type": "application/json"}))


@pytest.mark.parametrize(
    "image",
    [
        "data:image/png;base64,",
        "data:image/png;base64,%%%",
        "data:image/png;base64,AAA",
        "data:image/png;base64, AAAA",
        f"data:image/svg+xml;base64,{base64.b64encode(b'<svg/>').decode()}",
        f"data:text/html;base64,{base64.b64encode(b'<html>').decode()}",
        "data:image/png,AAAA",
        "data:",
        "https://example.org/cat.png",
        "HTTP://127.0.0.1/cat.png",
        "file:///etc/passwd",
        "/etc/passwd",
        {"file_id": "file-1"},
        {"image_url": {"url": {"url": URL}}},
        {},
        7,
        True,
        "\ud800",
        "ä",
        "A" * 100_000,
    ],
)
def test_an_image_that_is_none(http: httpx.Client, image: Any) -> None:
    body = json.dumps({**FORM, "image": image})
    says(http.post(EDITS, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("size", [(60_000, 60_000), (1001, 1000), (2**31 - 1, 1), (0, 5)])
def test_an_image_bomb(http: httpx.Client, size: tuple[int, int]) -> None:
    says(http.post(EDITS, data=FORM, files={"image": bomb(*size)} if size[0] < 10**6 else {"image": bomb(1, 2)[:30]}))


@pytest.mark.parametrize(
    ("prompt", "status"),
    [
        ("\0", 200),
        ("a\0b", 200),
        ("\u202e\u200b\ufeff", 200),
        ("e\u0301" * 50, 200),
        ("\U0001f600" * 50, 200),
        ("\ud800", 400),
        ("x\udfff", 400),
        ("<|im_end|>", 400),
        ("x<|image_pad|>", 400),
        ("<|im_end|\0>", 200),
        (" \n\t", 400),
        ("x" * 4001, 400),
        (7, 400),
        (["x"], 400),
        ({"x": 1}, 400),
        (True, 400),
    ],
)
def test_prompts(http: httpx.Client, prompt: Any, status: int) -> None:
    body = json.dumps({**FORM, "image": URL, "prompt": prompt})
    answer = http.post(EDITS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    if status == 400:
        says(answer)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 11, 1e9, 1.5, "1e9", "9" * 30, True, "NaN", "٣٣"]),
        ("size", ["0x0", "-1x5", "1x", "x", "1e3x1e3", "9999999x64", "64x64x64", 7, "auto "]),
        ("seed", [-1, 2**32, 1e300, "0x10", " "]),
        ("steps", [0, 1001, -5, "1_0"]),
        ("guidance", ["nan", "inf", -1e308, "x", True]),
        ("user", ["a\nb", "x" * 257, 7]),
        ("model", ["../x", "x" * 100_000, 7]),
        ("stream", ["yes", 7]),
        ("output_compression", [101, -1, 50]),
        ("partial_images", [4, -1, 1]),
    ],
)
def test_values(http: httpx.Client, name: str, values: list[Any]) -> None:
    for value in values:
        answer = http.post(EDITS, json={**FORM, "image": URL, name: value})
        says(answer, 404 if name == "model" and value == "../x" else 400)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        ("Bearer key", 200),
        ("Bearer ключ", 200),
        ("bearer  key ", 200),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("", 401),
        ("key", 401),
        ("Basic key", 401),
        ("Bearer Key", 401),
        ("Bearer key key", 401),
        ("Bearer ключи", 401),
        ("Bearer \xff", 401),
    ],
)
def test_keys(server: Server, authorization: str, status: int) -> None:
    request = head("Authorization: KEY", method="GET", path="/v1/models").replace(b"Authorization: Bearer key\r\n", b"")
    sent = authorization.encode("latin-1" if authorization.endswith("\xff") else "utf-8")
    assert talk(server, request.replace(b"KEY", sent)).startswith(f"HTTP/1.1 {status}".encode())


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "", "x" * 5000])
def test_a_page_of_another_site_is_refused(http: httpx.Client, origin: str) -> None:
    message = says(http.post(EDITS, data=FORM, files={"image": PNG}, headers={"Origin": origin}), 403)
    assert "takes no requests from pages of" in message


def test_the_own_page_is_answered(server: Server, http: httpx.Client) -> None:
    for origin in (server.url, server.url.upper()):
        assert http.post(EDITS, data=FORM, files={"image": PNG}, headers={"Origin": origin}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2f..%2fapp.py",
        "/static/page.js/",
        "/static/page.js%00",
        "//etc/passwd",
        "/v1/models/..%2f..%2fx",
        "/" + "a" * 8000,
    ],
)
def test_paths_lead_nowhere(server: Server, http: httpx.Client, path: str) -> None:
    answer = talk(server, head(method="GET", path=path))
    assert answer[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 307"), answer
    assert b"import" not in answer


def test_other_methods(http: httpx.Client) -> None:
    for path in ("/", "/static/page.js", "/healthz", "/readyz", "/metrics", "/v1/models"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert http.request("OPTIONS", path).status_code == 405
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
        says(http.request(method, EDITS), 405)


def test_clients_that_leave_at_any_time(server: Server, http: httpx.Client) -> None:
    """While they send, before the first byte of the answer, and at every step."""
    boundary = b"--x\r\nContent-Disposition: form-data; name="
    body = b"".join(
        boundary + f'"{name}"\r\n\r\n{value}\r\n'.encode() for name, value in FORM.items() if name != "steps"
    )
    body += boundary + b'"steps"\r\n\r\n40\r\n' + boundary + b'"stream"\r\n\r\ntrue\r\n'
    body += boundary + b'"image"; filename="a.png"\r\n\r\n' + PNG + b"\r\n--x--\r\n"
    request = head("Content-Type: multipart/form-data; boundary=x", f"Content-Length: {len(body)}") + body
    port = int(server.url.rpartition(":")[2])

    def leave(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request[: len(request) * (number + 1) // 8])
            for _ in range(number - 7):
                if not connection.recv(400):
                    break

    threads = [threading.Thread(target=leave, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    deadline = time.monotonic() + 60
    while server.service.running + server.service.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_errors_hold_no_bytes_of_an_image(http: httpx.Client) -> None:
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"secret" * 100)
    assert "secret" not in says(http.post(EDITS, data=FORM, files={"image": ("secret.png", file, "secret/secret")}))
