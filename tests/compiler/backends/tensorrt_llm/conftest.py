"""The small decoder of transformers; the package is imported when a test needs it."""

import pytest

from tests.support.trtllm.small import Small, small


@pytest.fixture(scope="session")
def decoder() -> Small:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return small()
