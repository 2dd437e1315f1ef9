"""The report for a terminal, and the formats by name."""

from pathlib import Path

import pytest

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.registry import REPORTS, write_report
from qie.compiler.validation.reports.text import text
from tests.support.reports import failed_report, hostile_report, incomplete_report, passed_report


def test_a_level_is_a_table() -> None:
    lines = text(passed_report()).splitlines()
    assert lines[:3] == [
        "structure          case  value  gate           result",
        "-----------------  ----  -----  -------------  ------",
        "files                        0  at most 0      passed",
    ]
    assert "psnr    5 cases, worst two images  33.25 dB  at least 28  passed" in lines


@pytest.mark.parametrize(
    ("report", "last"),
    [
        (passed_report(), "19 passed, 0 failed, 0 not run: passed"),
        (failed_report(), "16 passed, 2 failed, 1 not run: failed"),
        (incomplete_report(), "3 passed, 0 failed, 16 not run: incomplete"),
        (incomplete_report(required=True), "3 passed, 0 failed, 16 not run: failed"),
    ],
    ids=["passed", "failed", "incomplete", "required"],
)
def test_the_last_line_is_the_verdict(report: Report, last: str) -> None:
    assert text(report).splitlines()[-1] == last


def test_reasons_follow_the_table_of_their_level() -> None:
    shown = text(failed_report())
    assert "  transformer: relative L2; the largest error is at step 4 of case flip; bisect it\n\ntrajectory" in shown
    assert "  memory: this machine has no GPU of compute capability 8.9; run `qie validate` on one\n\nbisected" in shown


def test_the_least_similar_operations_are_shown() -> None:
    report = failed_report()
    least = min(report.bisections[0].operations, key=lambda op: op.similarity)
    shown = text(report).partition("bisected")[2]
    assert shown.split("tolerance is transformer_blocks.3, ")[0]
    first = next(line for line in shown.splitlines() if "transformer_blocks." in line and "layers.py" in line)
    assert least.name in first
    assert "and 1490 more similar ones" in shown


def test_hostile_text_cannot_control_the_terminal() -> None:
    assert not set(text(hostile_report())) & {"\x00", "\x1b", "\u202e", "\ud800"}


@pytest.mark.parametrize("format", REPORTS)
def test_a_report_is_written_whole(format: str, tmp_path: Path) -> None:  # noqa: A002
    report = hostile_report()
    path = tmp_path / "report"
    path.write_text("earlier")
    write_report(report, path, format)
    assert path.read_bytes() == REPORTS[format](report).encode()
    assert list(tmp_path.iterdir()) == [path]


def test_the_formats_are_deterministic() -> None:
    for write in REPORTS.values():
        assert write(hostile_report()) == write(hostile_report())


def test_an_unknown_format_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="pdf"):
        write_report(passed_report(), tmp_path / "report", "pdf")
    assert list(tmp_path.iterdir()) == []
