"""The pocket model beside its golden file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden, open_golden
from qie.compiler.validation.subject import Subject
from tests.support.subjects import opened


@pytest.fixture(scope="package")
def golden() -> Golden:
    return open_golden(POCKET / GOLDEN_FILE)


@pytest.fixture(scope="package")
def sound(pocket_bundle: Path, golden: Golden) -> Iterator[Subject]:
    """The pocket model's bundle, which agrees with its golden file; not to be changed."""
    with opened(pocket_bundle, golden) as subject:
        yield subject
