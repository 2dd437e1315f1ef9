"""Pages in headless Chromium, which reaches no network: their DOM, their console, and what they asked for."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Opened", "chromium", "content_width", "open_page"]

NAMES = ("chromium", "chromium-browser", "google-chrome")

OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--v=0",
)

OF_THE_BROWSER = "not an origin"
"""What the log names as the origin of requests that no page made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A page that was opened.

    Attributes:
        dom: the document as HTML after it was loaded.
        console: the lines of the console.
        requests: addresses that the page asked the network for.
    """

    dom: str
    console: list[str]
    requests: list[str]


def chromium() -> str:
    """The program; skips where Chromium is not installed."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("Chromium is not installed; run `apt-get install chromium`")
    return program


def open_page(page: Path, *, width: int = 1440, height: int = 1000) -> Opened:
    """Open a file in a window of this size, in pixels; skips where Chromium is not installed."""
    program = chromium()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "network.json"
        command = [program, *OPTIONS, f"--window-size={width},{height}", f"--user-data-dir={folder}/profile"]
        done = subprocess.run(
            [*command, f"--log-net-log={log}", "--dump-dom", page.as_uri()],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        requests = _requests(log)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    return Opened(dom=done.stdout, console=console, requests=requests)


def content_width(page: Path, *, width: int) -> tuple[int, int]:
    """The width in pixels of a page's content and of its window: a copy of the page, without its policy, says both.

    The page is in a frame, which has exactly this width.
    """
    text = page.read_text(encoding="utf-8")
    policy = text[text.index('<meta http-equiv="Content-Security-Policy"') :].partition(">")[0] + ">"
    with tempfile.TemporaryDirectory(prefix="page-") as folder:
        inner, outer = Path(folder) / "inner.html", Path(folder) / "outer.html"
        script = "parent.postMessage([document.documentElement.scrollWidth, innerWidth], '*')"
        measured = f"<script>onload = () => {script}</script></body>"
        inner.write_text(text.replace(policy, "").replace("</body>", measured), encoding="utf-8")
        outer.write_text(
            "<!doctype html><p id=result></p><script>onmessage = (event) => {"
            " document.getElementById('result').textContent = JSON.stringify(event.data) }</script>"
            f"<iframe src=inner.html width={width} height=900 style='border: 0'></iframe>",
            encoding="utf-8",
        )
        dom = open_page(outer).dom
    content, window = json.loads(dom.partition('id="result">')[2].partition("<")[0])
    return content, window


def _requests(log: Path) -> list[str]:
    """The addresses that a page asked for, by the log of the network."""
    data = json.loads(log.read_text(encoding="utf-8"))
    kind = data["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    started = [event.get("params", {}) for event in data["events"] if event["type"] == kind]
    return [one["url"] for one in started if "url" in one and one.get("initiator") != OF_THE_BROWSER]
