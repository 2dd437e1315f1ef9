"""The formats of a report by their name, and the writing of one."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qie.compiler.validation.report import Report
from qie.compiler.validation.reports.html.page import html
from qie.compiler.validation.reports.junit import junit
from qie.compiler.validation.reports.markdown import markdown
from qie.compiler.validation.reports.plain import plain
from qie.compiler.validation.reports.text import text
from qie.engines.files import replacing

__all__ = ["REPORTS", "write_report"]

REPORTS: Mapping[str, Callable[[Report], str]] = {
    "text": text,
    "json": plain,
    "junit": junit,
    "markdown": markdown,
    "html": html,
}
"""The text of a report in each format."""


def write_report(report: Report, path: Path, format: str) -> None:  # noqa: A002 - a key of REPORTS is a format
    """Write a report in UTF-8; an earlier file at ``path`` is replaced when the new one is complete.

    Args:
        report: of a validation.
        path: the file; its folder exists.
        format: a key of ``REPORTS``.

    Raises:
        KeyError: there is no such format.
        OSError: it cannot be written; an earlier file stays.
    """
    content = REPORTS[format](report)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode())
