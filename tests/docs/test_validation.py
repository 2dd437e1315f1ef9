"""docs/validation.md: the tables of faults are those that the tests inject."""

from tests.support.faults.catalogue import FAULTS
from tests.support.faults.table import table
from tests.support.repository import ROOT

DOCUMENT = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")


def test_the_tables_of_faults_are_those_of_the_tests() -> None:
    section = DOCUMENT.split("## Faults that are found\n")[1].split("\n## ")[0]
    assert "### " + section.split("### ", 1)[1].strip() == table()


def test_the_number_of_faults() -> None:
    assert f"{len(FAULTS)} faults" in DOCUMENT
