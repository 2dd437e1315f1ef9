"""The report as JUnit XML, which GitHub's actions, GitLab and Jenkins show.

A level is a test suite and a check a test case. A check that did not run is skipped, and a failure where the validation
requires every check. The elements and attributes are those that Jenkins' schema and Maven Surefire's have in common
(https://github.com/jenkinsci/xunit-plugin, junit-10.xsd).
"""

import math
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from qie.compiler.validation.report import Check, Report
from qie.compiler.validation.reports.words import by_level, clean, facts, subject, value_words

__all__ = ["junit"]


def junit(report: Report) -> str:
    """The report as one ``testsuites`` element in UTF-8.

    Where nothing ran, so that no check says why the validation failed, a test case of its own does.
    """
    root = Element("testsuites", name=clean(f"qie validate {report.provenance.bundle}"))
    suites = [_suite(report, level, [_case(c, report) for c in checks]) for level, checks in by_level(report).items()]
    if report.verdict == "failed" and not any(int(suite.attrib["failures"]) for suite in suites):
        suites.append(_suite(report, "verdict", [_nothing_ran()]))
    root.extend(suites)
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.attrib[key]) for suite in suites)))
    root.set("time", _seconds(report.seconds))
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _suite(report: Report, level: str, cases: Sequence[Element]) -> Element:
    suite = Element("testsuite", name=f"qie.{level}", timestamp=clean(report.created), tests=str(len(cases)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("errors", "0")
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    suite.set("time", _seconds(math.fsum(float(case.attrib["time"]) for case in cases)))
    properties = SubElement(suite, "properties")
    for name, lines in facts(report).items():
        SubElement(properties, "property", name=name, value=", ".join(lines))
    suite.extend(cases)
    return suite


def _case(check: Check, report: Report) -> Element:
    case = Element("testcase", classname=f"qie.{check.level}", name=subject(check), time=_seconds(check.seconds))
    detail = clean(check.detail)
    if check.result == "failed":
        message = f"{clean(check.metric)} is {value_words(check)}, gate {check.gate}"
        lines = [message, detail, clean(f"gate: {check.gate.key or 'fixed'}"), clean(f"ran on: {check.on}")]
        SubElement(case, "failure", type="gate", message=message).text = "\n".join(lines)
    elif check.result == "not run" and report.required:
        SubElement(case, "failure", type="not run", message=f"required, and not run: {detail}").text = detail
    elif check.result == "not run":
        SubElement(case, "skipped", message=detail)
    return case


def _nothing_ran() -> Element:
    case = Element("testcase", classname="qie.verdict", name="at least one check ran", time=_seconds(0))
    message = "no check ran, and nothing that was not run has passed"
    SubElement(case, "failure", type="not run", message=message).text = message
    return case


def _seconds(value: float) -> str:
    """A duration as a decimal number of seconds; 0 where it is none."""
    return f"{value if math.isfinite(value) and value > 0 else 0:.3f}"
