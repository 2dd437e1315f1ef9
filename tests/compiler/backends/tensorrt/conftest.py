"""Facts of a backend that a test changes."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qie.engines.backends import BACKENDS


@pytest.fixture
def set_facts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change facts of a backend: ``set_facts("tensorrt", build_module="tensorrt_rtx")``."""
    return lambda backend, **facts: monkeypatch.setitem(BACKENDS, backend, replace(BACKENDS[backend], **facts))
