from pathlib import Path

import pytest

from tests.support.checkpoints import write_small_checkpoint


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of a few small files, which may be changed."""
    return write_small_checkpoint(tmp_path / "model")
