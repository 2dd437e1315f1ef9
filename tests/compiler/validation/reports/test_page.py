"""The page as HTML: what it holds, and that it refers to nothing outside itself."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from qie.compiler.validation.golden.file import png
from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.html.images import difference
from qie.compiler.validation.reports.html.page import html
from qie.compiler.validation.reports.html.sections import bar
from tests.support.images import noise_image
from tests.support.reports import (
    check,
    failed_report,
    hostile_report,
    incomplete_report,
    passed_report,
    rebuilt,
    sound_bisection,
)

REPORTS = {
    "passed": passed_report(),
    "failed": failed_report(operations=60),
    "incomplete": incomplete_report(),
    "hostile": hostile_report(),
}


class Page(HTMLParser):
    """The tags, attributes and text of a page, and whether every element is closed in order."""

    VOID = frozenset({"meta", "img", "wbr", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def headings(report: Report) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html(report))


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_refers_to_nothing_outside_itself(name: str) -> None:
    page = Page(html(REPORTS[name]))
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video", "use"}
    references = [value for _, key, value in page.attributes if key in ("src", "href", "action", "srcset", "data")]
    assert references
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert not [key for _, key, _ in page.attributes if key.startswith("on") or key == "style"]
    (style,) = re.findall(r"<style>(.*?)</style>", html(REPORTS[name]), re.DOTALL)
    assert not re.search(r"url\(|@import|https?:", style)


@pytest.mark.parametrize("name", REPORTS)
def test_a_link_leads_to_a_section(name: str) -> None:
    attributes = Page(html(REPORTS[name])).attributes
    ids = [value for _, key, value in attributes if key == "id"]
    links = [value for tag, key, value in attributes if (tag, key) == ("a", "href")]
    assert len(set(ids)) == len(ids)
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_the_policy_comes_before_anything_that_could_load() -> None:
    text = html(passed_report())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert text.index("Content-Security-Policy") < text.index("<title>") < text.index("<style>")


def test_sections_are_there_where_there_is_something_to_show() -> None:
    assert headings(passed_report()) == ["Checks", "Images", "Error over steps", "Measurements", "Provenance"]
    assert headings(incomplete_report()) == ["Needs attention", "Checks", "Provenance"]
    assert headings(failed_report(operations=9))[0] == "Needs attention"
    assert "Bisection" in headings(failed_report(operations=9))
    assert headings(replace(passed_report(), checks=(), images=(), measurements=())) == ["Provenance"]


def test_verdict_and_counts_are_words() -> None:
    text = Page(html(failed_report(operations=9))).text
    assert "Failed16 of 19 checks passed, 2 failed, 1 did not run." in text
    assert "and all are required" in Page(html(incomplete_report(required=True))).text
    assert "No check ran." in Page(html(replace(passed_report(), checks=()))).text


def test_every_digest_is_on_the_page() -> None:
    origin = passed_report().provenance
    text = Page(html(passed_report())).text
    for digest in (origin.manifest, origin.checkpoint, origin.recipe_digest, origin.golden_digest):
        assert str(digest) in text


def test_all_operations_are_on_the_page_and_the_first_ones_are_marked() -> None:
    report = failed_report()
    text = html(report)
    assert text.count('class="first-operation"') == 1
    assert text.count('class="first-block"') == 6
    assert "1475 more operations" in text
    rows = re.findall(r'<td class="number">(\d\.\d{6})</td>', text)
    assert len(rows) == 1500
    assert rows == sorted(rows)
    assert len(text) < 2_500_000


def test_attention_begins_with_where_the_reference_is_left_first() -> None:
    text = Page(html(failed_report(operations=60))).text.rpartition("Needs attention")[2]
    assert text.startswith("look here first transformer all its operations")
    assert (
        text.index("transformer_blocks.3.attn.to_q") < text.index("compiler/graphs/layers.py:58") < text.index("flip")
    )


def test_sound_operations_and_passed_cases_are_folded() -> None:
    report = replace(failed_report(), bisections=(sound_bisection("vision", 9),))
    text = html(report)
    assert "<summary>9 operations</summary>" in text
    assert "<summary>all 5</summary>" in text
    assert text.count('class="passed" role="row"') + text.count('role="row" class="passed"') == 9
    assert "look here first" not in text


def test_a_failed_case_leads_to_its_images() -> None:
    text = html(failed_report(operations=9))
    assert '<a href="#images-2">its images</a>' in text
    assert '<a href="#images-2">flip</a>' in text


def test_images_say_what_made_them() -> None:
    assert 'alt="Engines, case tint"' in html(passed_report())
    text = html(rebuilt(passed_report()))
    assert 'alt="Graphs in float32, case tint"' in text and 'alt="Engines' not in text


def test_the_difference_is_tenfold_and_bounded() -> None:
    first = np.full((2, 3, 3), 100, np.uint8)
    second = first.copy()
    second[0, 0], second[1, 2] = (103, 90, 100), (200, 100, 101)
    made = difference(png(first).tobytes(), png(second).tobytes())
    assert made is not None
    pixels = np.asarray(Image.open(io.BytesIO(made)))
    assert pixels[0, 0].tolist() == [30, 100, 0]
    assert pixels[1, 2].tolist() == [255, 0, 10]
    assert int(pixels.sum()) == 30 + 100 + 255 + 10


def test_images_of_different_sizes_have_no_difference() -> None:
    report = passed_report()
    odd = replace(report.images[0], edit=png(noise_image(8, 8)).tobytes())
    assert difference(odd.reference, odd.edit) is None
    assert "The sizes of the two edits differ." in html(replace(report, images=(odd,)))


def test_the_images_on_the_page_are_those_of_the_report() -> None:
    report = passed_report()
    shown = [base64.b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", html(report))]
    case = report.images[-1]
    assert shown[-5:-1] == [*case.inputs, case.reference, case.edit]


@pytest.mark.parametrize(
    ("value", "bound", "sense", "length"),
    [
        (0.015, 0.03, "at most", 40.0),
        (0.03, 0.03, "at most", 80.0),
        (9.0, 0.03, "at most", 120.0),
        (28, 28, "at least", 80.0),
        (-5.0, 28, "at least", 1.5),
        (float("nan"), 0.03, "at most", 1.5),
        (float("inf"), 0.03, "at most", 120.0),
        (0, 0, "at most", 2.0),
        (3, 0, "at most", 120.0),
    ],
)
def test_a_bar_is_as_long_as_its_value(value: float, bound: float, sense: str, length: float) -> None:
    drawn = bar(check("one", value, bound, sense=sense))
    assert drawn is not None
    assert float(drawn.findall("rect")[2].attrib["width"]) == pytest.approx(length)
