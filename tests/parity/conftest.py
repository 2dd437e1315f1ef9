import os

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tests.support.parity import Side, SideOf, make_side


@pytest.fixture(scope="session")
def side_of(tmp_path_factory: pytest.TempPathFactory) -> SideOf:
    """The sides by the name of their case, each built once."""
    folder = tmp_path_factory.mktemp("parity")
    os.environ["QIE_HOME"] = str(folder / "home")
    sides: dict[str, Side] = {}

    def find(name: str) -> Side:
        if name not in sides:
            sides[name] = make_side(name, folder)
        return sides[name]

    return find
