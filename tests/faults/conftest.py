"""What all faults have in common: nothing is left behind."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_is_left(workplace: Path, qie_home: Path) -> Iterator[None]:
    """What a refused command must not leave: an image, a bundle, or a piece of either."""
    yield
    assert not [path for path in workplace.rglob("*") if path.name.startswith(".") or "edited" in path.name]
    assert not [path for path in (qie_home / "bundles").glob("*") if path.name.startswith(".")]


@pytest.fixture
def bad_checkpoint(checkpoint: Path, workplace: Path) -> Path:
    """A copy of the checkpoint to be damaged, in the folder ``bad`` of the current one."""
    shutil.copytree(checkpoint, workplace / "bad")
    return workplace / "bad"
