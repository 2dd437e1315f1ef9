"""The report for a terminal, and the formats by name."""

from dataclasses import replace
from pathlib import Path

import pytest

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.registry import REPORTS, write_report
from qie.compiler.validation.reports.text import text
from qie.engines.bundle.manifest import Component
from tests.support.reports import (
    check,
    failed_report,
    hostile_report,
    incomplete_report,
    passed_report,
    rebuilt,
    sound_bisection,
)


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
    assert "  transformer: relative L2 0.0713, gate at most 0.03; the largest error is at step 4" in shown
    assert "  memory: this machine has no GPU of compute capability 8.9; run `qie validate` on one\n\nbisected" in shown


def test_the_passed_cases_of_a_check_are_one_row() -> None:
    rows = [line.split() for line in text(failed_report()).splitlines() if line.startswith("velocity  ")]
    assert [" ".join(row) for row in rows] == [
        "velocity 4 cases, worst two images 0.04199 at most 0.05 passed",
        "velocity flip 0.3359 at most 0.05 failed",
    ]


def test_the_worst_is_named_where_cases_differ_and_components_are_no_cases() -> None:
    names: tuple[Component, ...] = ("vision", "language", "vae_encoder")
    blocks = [check("blocks", 0.01 * n, 0.1, case=name) for n, name in enumerate(names, start=1)]
    alike = [check("repeats", 0, 0, case=case) for case in ("one", "two")]
    lines = text(replace(passed_report(), checks=(*blocks, *alike))).splitlines()
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        "blocks 3, worst vae_encoder 0.03 at most 0.1 passed",
        "repeats 2 cases 0 at most 0 passed",
    ]


def test_where_the_reference_is_left_first_is_told_last() -> None:
    report = failed_report()
    late = replace(report.bisections[0], component="vae_decoder", first_operation="conv_in")
    for found in (
        (late, *report.bisections),
        (*report.bisections, late),
        (sound_bisection("vision", 5), *report.bisections),
    ):
        part = text(replace(report, bisections=found)).split("\n\n")[-2]
        assert part.splitlines() == [
            "first outside its tolerance: transformer_blocks.3.attn.to_q of transformer, written by",
            "compiler/graphs/layers.py:58",
            "  relative L2 0.1602, tolerance 0.02; it reads transformer_blocks.3.attn.to_q.weight,",
            "  transformer_blocks.3.attn.to_q.bias; the first block is transformer_blocks.3",
        ]
    assert "first outside" not in text(replace(report, bisections=(sound_bisection("vision", 5),)))


def test_what_ran_in_place_of_the_engines_is_told() -> None:
    assert "ran tensorrt-rtx 1.7.1, GPU, not the engines of the bundle" in text(rebuilt(passed_report()))
    assert "not the engines" not in text(passed_report()) + text(incomplete_report())


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
