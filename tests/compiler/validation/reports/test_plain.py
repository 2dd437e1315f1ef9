"""The report as JSON."""

import hashlib
import json
from dataclasses import fields
from typing import Any

import pytest

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.plain import plain
from tests.support.reports import failed_report, hostile_report, incomplete_report, passed_report


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def read(report: Report) -> dict[str, Any]:
    """The report as a reader has it that knows only what the standard of JSON allows."""
    data: dict[str, Any] = json.loads(plain(report).encode(), parse_constant=refuse)
    return data


def test_the_keys_are_the_verdict_the_counts_and_all_of_the_report() -> None:
    assert list(read(passed_report())) == ["verdict", "counts", *(field.name for field in fields(Report))]


@pytest.mark.parametrize(
    ("report", "verdict", "counts"),
    [
        (passed_report(), "passed", (19, 0, 0)),
        (failed_report(operations=9), "failed", (16, 2, 1)),
        (incomplete_report(), "incomplete", (3, 0, 16)),
        (incomplete_report(required=True), "failed", (3, 0, 16)),
    ],
    ids=["passed", "failed", "incomplete", "required"],
)
def test_verdict_and_counts(report: Report, verdict: str, counts: tuple[int, ...]) -> None:
    data = read(report)
    assert data["verdict"] == verdict
    assert tuple(data["counts"].values()) == counts
    assert [check["result"] for check in data["checks"]] == [check.result for check in report.checks]


def test_images_are_their_digests() -> None:
    report = passed_report()
    first = read(report)["images"][0]
    assert first["inputs"] == [hashlib.sha256(file).hexdigest() for file in report.images[0].inputs]
    assert first["edit"] == hashlib.sha256(report.images[0].edit).hexdigest()
    assert len(plain(report)) < 20_000


def test_numbers_that_are_not_finite_are_text() -> None:
    values = {check["name"]: check["value"] for check in read(hostile_report())["checks"]}
    assert (values["nan"], values["inf"], values["minus inf"]) == ("nan", "inf", "-inf")
    (steps,) = (check["steps"] for check in read(hostile_report())["checks"] if check["name"] == "nan")
    assert steps == [0.01, "nan", 0.02, "inf", "-inf", 0.0]


def test_every_operation_is_there() -> None:
    (bisection,) = read(failed_report())["bisections"]
    assert len(bisection["operations"]) == 1500
    assert bisection["first_operation"] == "transformer_blocks.3.attn.to_q"
