"""The report as JUnit XML, checked against the rules of Jenkins' schema and Maven Surefire's."""

import re
from dataclasses import replace
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.junit import junit
from tests.support.reports import HOSTILE, failed_report, hostile_report, incomplete_report, not_run, passed_report

NUMBER, TIME, TEXT = r"\d+", r"\d+\.\d{3}", r"(?s).*"

ATTRIBUTES: dict[str, dict[str, str]] = {
    "testsuites": {"name": TEXT, "tests": NUMBER, "failures": NUMBER, "errors": NUMBER, "time": TIME},
    "testsuite": {
        "name": r"\S+",
        "tests": NUMBER,
        "failures": NUMBER,
        "errors": NUMBER,
        "skipped": NUMBER,
        "time": TIME,
        "timestamp": TEXT,
    },
    "properties": {},
    "property": {"name": TEXT, "value": TEXT},
    "testcase": {"classname": r"\S+", "name": TEXT, "time": TIME},
    "failure": {"type": r"gate|not run", "message": r"(?s).+"},
    "skipped": {"message": r"(?s).+"},
}
"""What both schemas allow or require, with the form of each value."""

CHILDREN: dict[str, str] = {
    "testsuites": r"(testsuite )*",
    "testsuite": r"(properties )?(testcase )*",
    "properties": r"(property )+",
    "testcase": r"(skipped |failure )?",
}
"""The order of what an element holds; nothing where an element is not named."""

REPORTS = {
    "passed": passed_report(),
    "failed": failed_report(operations=9),
    "incomplete": incomplete_report(),
    "required": incomplete_report(required=True),
    "hostile": hostile_report(),
}


def faults(element: Element) -> list[str]:
    """What the schemas do not allow in an element and below it."""
    expected = ATTRIBUTES.get(element.tag)
    if expected is None:
        return [f"<{element.tag}>"]
    found = [f"{element.tag}/@{name}" for name in element.attrib.keys() ^ expected.keys()]
    found += [
        f"{element.tag}/@{name}={value}"
        for name, value in element.attrib.items()
        if name in expected and not re.fullmatch(expected[name], value)
    ]
    order = "".join(f"{child.tag} " for child in element)
    if not re.fullmatch(CHILDREN.get(element.tag, ""), order):
        found.append(f"{element.tag}: {order}")
    return [*found, *(fault for child in element for fault in faults(child))]


def read(report: Report) -> Element:
    return ElementTree.fromstring(junit(report).encode())


@pytest.mark.parametrize("name", REPORTS)
def test_the_schemas_allow_it(name: str) -> None:
    assert faults(read(REPORTS[name])) == []


@pytest.mark.parametrize("name", REPORTS)
def test_the_counts_are_those_of_the_cases(name: str) -> None:
    report, root = REPORTS[name], read(REPORTS[name])
    for suite in root:
        assert int(suite.attrib["tests"]) == len(suite.findall("testcase")) > 0
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped"))
    assert int(root.attrib["tests"]) == len(report.checks)
    missing = report.count("not run")
    assert int(root.attrib["failures"]) == report.count("failed") + (missing if report.required else 0)
    assert len(root.findall("*/testcase/skipped")) == (0 if report.required else missing)


def test_a_level_is_a_suite() -> None:
    names = [suite.attrib["name"] for suite in read(passed_report())]
    assert names == ["qie.structure", "qie.components", "qie.trajectory", "qie.edits"]


def test_a_failure_names_value_gate_and_what_was_found() -> None:
    root = read(failed_report(operations=9))
    (case,) = (case for case in root.iter("testcase") if case.attrib["name"] == "velocity (flip)")
    (failure,) = case
    assert failure.attrib["message"] == "relative L2 is 0.3359, gate at most 0.05"
    assert "the largest error is at step 4" in str(failure.text)
    assert "gate: gates.trajectory.velocity" in str(failure.text)


def test_a_check_that_did_not_run_says_why() -> None:
    skipped = [case.attrib["message"] for case in read(incomplete_report()).iter("skipped")]
    assert len(skipped) == 16
    assert set(skipped) == {"this machine has no GPU of compute capability 8.9; run `qie validate` on one"}


@pytest.mark.parametrize("checks", ["none", "not run"])
def test_where_nothing_ran_there_is_a_failure(checks: str) -> None:
    report = passed_report()
    left = () if checks == "none" else tuple(map(not_run, report.checks))
    root = read(replace(report, checks=left))
    assert faults(root) == []
    assert root.attrib["failures"] == "1"
    assert root.attrib["tests"] == str(len(left) + 1)


def test_what_xml_cannot_hold_is_escaped() -> None:
    text = junit(hostile_report())
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]", text)
    names = [case.attrib["name"] for case in read(hostile_report()).iter("testcase")]
    assert any(r"\x00\x1b[31m\u202e\ud800\uffff ]]> &lt;" in name for name in names)
    assert HOSTILE.startswith("</style>")


def test_the_rules_find_what_they_should() -> None:
    text = '<testsuites name="" tests="x"><testcase name="a" classname="b c" time="1"><error/></testcase></testsuites>'
    found = faults(ElementTree.fromstring(text))
    assert {"testsuites: testcase ", "testsuites/@tests=x", "testcase/@classname=b c", "<error>"} <= set(found)
