"""The report as Markdown, read as GitHub reads it."""

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.markdown import markdown
from tests.support.reports import (
    HOSTILE,
    failed_report,
    hostile_report,
    incomplete_report,
    passed_report,
    rebuilt,
    sound_bisection,
)

LIMIT = 1 << 20
"""Bytes of a summary that GitHub shows."""

OURS = {"details", "summary", "br"}
TABLES = {"table", "thead", "tbody", "tr", "th", "td"}
BLOCKS = {"h2", "h3", "p", "strong", "ul", "li", "em"}


def rendered(report: Report) -> str:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown(report))


def tags(text: str) -> set[str]:
    return set(re.findall(r"<([a-zA-Z][\w-]*)", text))


@pytest.mark.parametrize(
    "report", [passed_report(), failed_report(), hostile_report()], ids=["passed", "failed", "hostile"]
)
def test_only_our_markup_is_markup(report: Report) -> None:
    assert tags(rendered(report)) <= OURS | TABLES | BLOCKS


@pytest.mark.parametrize("report", [failed_report(), hostile_report()], ids=["failed", "hostile"])
def test_every_row_has_the_cells_of_its_header(report: Report) -> None:
    tables = re.findall(r"<table>(.*?)</table>", rendered(report), re.DOTALL)
    assert len(tables) >= 6
    for table in tables:
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        columns = rows[0].count("<th")
        assert [row.count("<td") for row in rows[1:]] == [columns] * (len(rows) - 1)
    lines = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert {line.endswith("|") for line in lines} == {True}


def test_hostile_text_is_shown_as_it_is() -> None:
    text = rendered(hostile_report())
    assert "&lt;/style&gt;&lt;/title&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert r"&quot;'`|*_[a](https://b.example) ![](http://c.example/d.png) \x00\x1b[31m\u202e" in rendered(
        hostile_report()
    )


def test_the_verdict_comes_first_and_failures_before_what_did_not_run() -> None:
    text = markdown(failed_report())
    assert text.startswith(
        "## qie validate pocket-l40s, up to level edits: failed\n\n"
        "**bundles/pocket-l40s**: 16 passed, 2 failed, 1 not run"
    )
    parts = ("First outside its tolerance: transformer", "Failed", "Not run", "Levels", "Bisected")
    places = [text.index(part) for part in (*(f"### {part}" for part in parts), "Provenance")]
    assert places == sorted(places)
    assert "| components | transformer |  | 0.0713 | at most 0.03 |" in text
    assert "- First operation outside the tolerance: **transformer\\_blocks.3.attn.to\\_q**" in text
    assert "… and 1490 more operations" in text


def test_sound_operations_are_folded_and_cases_are_one_row() -> None:
    report = replace(failed_report(), bisections=(sound_bisection("vae_encoder", 9),))
    text = markdown(report)
    assert "First outside" not in text
    assert "\n\nAll 9 operations are within their tolerance, the largest relative L2 is 0.0009 in " in text
    assert "<details><summary>Operations</summary>" in text
    assert "| edits | psnr | 5 cases, worst two images | 33.25 dB | at least 28 |" in text


def test_what_ran_in_place_of_the_engines_is_told() -> None:
    report = passed_report()
    assert "not the engines" not in markdown(report)
    assert "Ran tensorrt-rtx 1.7.1, GPU, not the engines of the bundle." in markdown(rebuilt(report))
    assert "| Ran | nothing: no engine and no graph |" in markdown(incomplete_report())


def test_one_reason_is_given_once() -> None:
    text = markdown(incomplete_report())
    assert text.count("this machine has no GPU") == 1
    assert text.count("components: ") == 5


def test_a_report_without_checks_says_so() -> None:
    assert "No check ran." in markdown(replace(passed_report(), checks=()))


def test_github_shows_a_summary_of_whatever_is_in_it() -> None:
    """Every list long, every text long, and of characters that take the most bytes when they are escaped."""
    report = hostile_report()
    long = "$𝄞" * 5000
    checks = tuple(
        replace(check, name=long, case=long, detail=f"{n}{long}") for n in range(40) for check in report.checks
    )
    (bisection, *_) = report.bisections
    operations = tuple(replace(op, name=long, source=long) for op in bisection.operations)
    origin = replace(report.provenance, bundle=long, engines=(long,) * 500, packages=((long, long),) * 500)
    large = replace(
        report,
        provenance=origin,
        checks=tuple(checks),
        measurements=tuple(replace(m, name=long, case=long) for m in report.measurements) * 200,
        bisections=(replace(bisection, first_block=long, operations=operations),) * 50,
    )
    text = markdown(large).encode()
    assert 100_000 < len(text) < LIMIT


def test_the_hostile_text_is_one_that_does_harm() -> None:
    harm = MarkdownIt("commonmark").enable("table").render(HOSTILE)
    assert {"script", "img", "a"} <= tags(harm)
