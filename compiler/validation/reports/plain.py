"""The report as JSON: all of it, with the sha256 of every image in the place of its bytes.

The keys are those of the dataclasses in ``compiler/validation/report.py``, and ``verdict`` and ``counts`` before them.
A number that is not finite, which JSON does not have, is the text ``nan``, ``inf`` or ``-inf``.
"""

import hashlib
import json
import math
from typing import Any

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.words import counts
from qie.engines.records import to_plain

__all__ = ["plain", "plain_data"]


def plain_data(report: Report) -> dict[str, Any]:
    """The report as dicts, lists, text and finite numbers."""
    judged = {"verdict": report.verdict, "counts": counts(report.checks)}
    data: dict[str, Any] = _strict(judged | to_plain(report))
    return data


def plain(report: Report) -> str:
    """The report as strict JSON, indented, with the keys in the order of ``Report``."""
    return json.dumps(plain_data(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(data: Any) -> Any:
    """``data`` as what every reader of JSON takes."""
    match data:
        case dict():
            return {key: _strict(item) for key, item in data.items()}
        case list():
            return [_strict(item) for item in data]
        case bytes():
            return hashlib.sha256(data).hexdigest()
        case float() if not math.isfinite(data):
            return str(data)
        case str():
            return data.encode("utf-8", "backslashreplace").decode()
        case _:
            return data
