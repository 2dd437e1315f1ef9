"""The sound bundles, built once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.faults.bundles import build_sound


@pytest.fixture(scope="session")
def sound(pocket_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a sound bundle by its name; not to be changed."""
    built = {"pocket": pocket_bundle}

    def find(name: str) -> Path:
        if name not in built:
            built[name] = build_sound(name, tmp_path_factory.mktemp("sound") / "bundle")
        return built[name]

    return find
