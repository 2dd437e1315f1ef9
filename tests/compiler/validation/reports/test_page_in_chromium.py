"""The page in a browser: nothing in the console, nothing fetched, no scrolling sideways on a phone."""

from pathlib import Path

import pytest

from qie.compiler.validation.reports.registry import write_report
from tests.support import reports
from tests.support.chromium import content_width, open_page

KINDS = ("passed", "failed", "incomplete", "hostile")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of each report, KIND.html."""
    folder = tmp_path_factory.mktemp("pages")
    for kind in KINDS:
        write_report(getattr(reports, f"{kind}_report")(), folder / f"{kind}.html", "html")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_quiet_and_fetches_nothing(kind: str, pages: Path) -> None:
    opened = open_page(pages / f"{kind}.html")
    assert opened.console == []
    assert opened.requests == []
    assert "qie validate" in opened.dom


def test_hostile_text_makes_no_element(pages: Path) -> None:
    dom = open_page(pages / "hostile.html").dom
    assert "<script" not in dom
    assert "onerror=" not in dom.replace("onerror=alert(2)&gt;", "")
    assert dom.count("<style>") == 1
    assert "&lt;/style&gt;&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in dom


@pytest.mark.parametrize("width", [390, 820, 1440])
@pytest.mark.parametrize("kind", ["failed", "hostile"])
def test_a_page_does_not_scroll_sideways(kind: str, width: int, pages: Path) -> None:
    content, window = content_width(pages / f"{kind}.html", width=width)
    assert window == width
    assert content == width


def test_what_a_page_says_or_fetches_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><img src=http://127.0.0.1:9/x.png><script>console.error('hello')</script>")
    opened = open_page(page)
    assert opened.requests == ["http://127.0.0.1:9/x.png"]
    assert ['"hello"' in line for line in opened.console] == [True]


def test_the_policy_keeps_a_page_from_fetching_and_running(pages: Path, tmp_path: Path) -> None:
    """Even where text of the data became markup."""
    text = (pages / "passed.html").read_text(encoding="utf-8")
    hostile = "<img src=http://127.0.0.1:9/x.png><script>document.title = 'run'</script></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", hostile), encoding="utf-8")
    opened = open_page(tmp_path / "page.html")
    assert opened.requests == []
    assert "<title>pocket-l40s: passed</title>" in opened.dom


def test_a_page_that_scrolls_sideways_is_noticed(pages: Path, tmp_path: Path) -> None:
    text = (pages / "passed.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace("</main>", "<pre>" + "x" * 900 + "</pre></main>"))
    content, window = content_width(tmp_path / "page.html", width=390)
    assert content > window == 390
