"""What a report says of a fault, in one line each: the checks that failed, and where bisecting leaves the gate."""

from qie.compiler.validation.report import Bisection, Check, Report

__all__ = ["failures", "outside"]


def failures(report: Report) -> str:
    """The checks that failed, in their order, each with its cases where others of its cases did not.

    Which component fails the check ``blocks`` is what ``outside`` says.
    """
    found: dict[str, list[Check]] = {}
    for check in report.checks:
        found.setdefault(check.name, []).append(check)
    return ", ".join(_failure(name, checks) for name, checks in found.items() if any(map(_is_bad, checks)))


def _failure(name: str, checks: list[Check]) -> str:
    bad = [str(check.case) for check in checks if _is_bad(check)]
    return name if name == "blocks" or len(bad) == len(checks) else f"{name} ({', '.join(bad)})"


def _is_bad(check: Check) -> bool:
    return check.result == "failed"


def outside(report: Report) -> str:
    """``BLOCK: OPERATION`` of every component outside the gate; the operation alone where all blocks are within it."""
    return ", ".join(
        _place(found)
        for found in report.bisections
        if found.first_block is not None or found.first_operation is not None
    )


def _place(found: Bisection) -> str:
    return ": ".join(name for name in (found.first_block, found.first_operation) if name is not None)
