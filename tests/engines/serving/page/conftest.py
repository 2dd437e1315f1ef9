"""The page of a server in headless Chromium, and everything that it asks for."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.chromium import chromium
from tests.support.images import smooth_image
from tests.support.servers import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = "--host-resolver-rules=MAP evil.example 127.0.0.1,MAP * ~NOTFOUND,EXCLUDE 127.0.0.1"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*OPTIONS, names])
        yield browser
        browser.close()


@pytest.fixture
def requests() -> list[str]:
    """The addresses that the page asked for; what its policy held back was not asked for."""
    return []


@pytest.fixture
def said() -> list[str]:
    """What the console of the page said, and errors that no code caught."""
    return []


@pytest.fixture
def page(browser: "Browser", server: Server, requests: list[str], said: list[str]) -> "Iterator[Page]":
    """The page, opened; in the end the console was quiet, and nothing was asked for elsewhere."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: requests.remove(request.url) if request.failure == "csp" else None)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda problem: said.append(str(problem)))
    page.goto(server.url)
    yield page
    context.close()
    assert [url for url in requests if not url.startswith((f"{server.url}/", f"blob:{server.url}/"))] == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 150 x 90 pixels."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    smooth_image(150, 90, seed=1).save(path)
    return path
