"""Requests that nobody wrote: by the schema, damaged forms and damaged images. No 500, no traceback, no growth."""

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qie.engines.inputs.image import encode_image
from tests.support.images import smooth_image
from tests.support.servers import Process, serving_process
from tests.support.soak import attempts

EDITS = "/v1/images/edits"
IMAGE = smooth_image(40, 30, seed=1)
IMAGES = [encode_image(IMAGE, suffix) for suffix in (".png", ".jpg", ".webp")]
FORM = {"prompt": "make it red", "model": "other"}
"""A request whose images are decoded before it is refused."""

GROWTH = 1.05
"""Memory behind a fuzz, relative to that behind its first tenth."""

TRIES = {EDITS: 2000, "/v1/models/{name}": 200}
"""Requests of each kind at a path of the schema."""

MANY: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Process]:
    with serving_process(bundle, "--timeout", "5") as server:  # what the schema allows may be an edit of 1,000 steps
        yield server
        server.process.terminate()
        _, log = server.ended()
        assert "Traceback" not in log


@pytest.fixture
def http(server: Process) -> Iterator[httpx.Client]:
    once = httpx.Limits(max_keepalive_connections=0)  # the server closes what is idle while examples are drawn
    with httpx.Client(base_url=server.url, timeout=60, limits=once) as http:
        yield http
        files = {"image": IMAGES[0]}
        assert http.post(EDITS, data={"prompt": "make it red", "steps": "1"}, files=files).status_code == 200


def memory(server: Process) -> int:
    """Bytes of the server in memory."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


class Watch:
    """Counts answers, and the memory of the server while they come.

    Attributes:
        answers: statuses with their number.
    """

    def __init__(self, server: Process, requests: int) -> None:
        self._server, self._first = server, max(1, requests // 10)
        self.answers: Counter[int] = Counter()
        self._before = 0

    def see(self, status: int, text: str, kind: str) -> None:
        """Check an answer."""
        self.answers[status] += 1
        assert status < 500 or status == 504, text
        assert "Traceback" not in text and 'File "' not in text
        if status >= 400:
            assert kind == "application/json" and text.startswith('{"error":'), text
        if self.answers.total() == self._first:
            self._before = memory(self._server)

    def check_memory(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Check that memory did not grow, and print it."""
        after = memory(self._server)
        with capsys.disabled():
            sys.stdout.write(
                f"\n{name}: {dict(self.answers)}, {self._before / 1e6:.1f} MB, then {after / 1e6:.1f} MB\n"
            )
        assert after <= GROWTH * self._before


@st.composite
def damaged(draw: Any, contents: list[bytes]) -> bytes:
    """One of ``contents`` with bytes replaced, inserted, removed, or cut off."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["replace", "insert", "remove", "cut", "copy"])):
            case "replace":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
            case "insert":
                content[place:place] = draw(st.binary(max_size=20))
            case "remove":
                del content[place : place + draw(st.integers(1, 40))]
            case "cut":
                del content[place:]
            case "copy":
                content[place:place] = content[: draw(st.integers(0, 200))]
    return bytes(content)


def form_of(boundary: str) -> bytes:
    """The body of a form."""
    request = httpx.Request("POST", "http://x", data=FORM, files={"image": ("a.png", IMAGES[0], "image/png")},
                            headers={"content-type": f"multipart/form-data; boundary={boundary}"})  # fmt: skip
    return request.read()


def test_damaged_images(server: Process, http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    tries = attempts(100, 2500)
    watch = Watch(server, tries)

    @settings(max_examples=tries, **MANY)
    @given(damaged(IMAGES), st.sampled_from(["image", "image[]"]))
    def check(content: bytes, name: str) -> None:
        answer = http.post(EDITS, data=FORM, files={name: content})
        watch.see(answer.status_code, answer.text, answer.headers["content-type"])

    check()
    assert set(watch.answers) == {400, 404}
    watch.check_memory("damaged images", capsys)


def test_damaged_forms(server: Process, http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    tries = attempts(100, 2500)
    watch = Watch(server, tries)
    form = "multipart/form-data; boundary=b"
    kinds = [f"{form}b", f"{form}; charset=x", "multipart/form-data", "application/x-www-form-urlencoded"]
    bodies = [form_of("b"), b"prompt=x&n=1&image=%ff&a=%", b'{"prompt": "x", "image": "data:image/png;base64,AAAA"}']

    @settings(max_examples=tries, **MANY)
    @given(damaged(bodies), st.sampled_from([*[form] * 6, *kinds, "application/json"]))
    def check(content: bytes, kind: str) -> None:
        answer = http.post(EDITS, content=content, headers={"content-type": kind})
        watch.see(answer.status_code, answer.text, answer.headers["content-type"])

    check()
    assert {400, 404} <= set(watch.answers)
    watch.check_memory("damaged forms", capsys)


@pytest.mark.soak
@pytest.mark.filterwarnings("default")
def test_requests_by_the_schema(server: Process, http: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    """What the schema allows and what it forbids, at every path."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    operations = [
        found.ok() for found in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations()
    ]
    watch = Watch(server, 4500)
    for operation in operations:
        for mode in schemathesis.GenerationMode:
            ask(operation, operation.as_strategy(generation_mode=mode), server, watch)
    watch.check_memory("by the schema", capsys)


def ask(operation: Any, cases: st.SearchStrategy[Any], server: Process, watch: Watch) -> None:
    """Ask as often as the path deserves, each with a case of an operation of the schema."""
    known = {*operation.definition.raw["responses"], "405"}

    @settings(max_examples=TRIES.get(operation.path, 50), **MANY)
    @given(cases)
    def check(case: Any) -> None:
        answer = case.call(base_url=server.url, timeout=60)
        kind = answer.headers.get("content-type", [""])[0]
        watch.see(answer.status_code, answer.text, kind)
        assert str(answer.status_code) in known, (answer.status_code, operation.path)

    check()
