"""The small decoder, with what transformers computes of its prompt."""

import pytest

from tests.support.trtllm.small import Small, recorded


@pytest.fixture(scope="session")
def decoder() -> Small:
    return recorded()
