from pathlib import Path

import pytest

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden, open_golden
from tests.support.images import smooth_image

CASES = """
[[cases]]
name = "guided"
images = ["a.png", "b.png"]
instruction = "make it red"
negative = "blurry"
seed = 5
steps = 3
guidance = 3.0
size = "96x64"
record = 2
target = "target.png"

[[cases]]
name = "in a row"
images = ["a.png"]
instruction = "make it blue"
steps = 2
guidance = 1.0
chain = 2
"""


@pytest.fixture(scope="session")
def pocket_golden() -> Golden:
    """The file that comes with the pocket model."""
    return open_golden(POCKET / GOLDEN_FILE)


@pytest.fixture(scope="session")
def cases_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases with their images; not to be changed."""
    folder = tmp_path_factory.mktemp("cases")
    smooth_image(150, 90).save(folder / "a.png")
    smooth_image(77, 120, seed=1).save(folder / "b.png")
    smooth_image(96, 64, seed=2).save(folder / "target.png")
    (folder / "cases.toml").write_text(CASES)
    return folder / "cases.toml"
