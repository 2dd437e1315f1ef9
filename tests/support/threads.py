"""One thread for everything that a test computes: the workers of pytest-xdist share the cores already.

Each of them would start a thread per core, and these wait for each other by spinning. A number of threads that a test
asks for is kept, and ``make test-soak`` runs with a thread per core, as edits do.
"""

import os
from typing import Any

import onnxruntime as ort
import pytest

__all__ = ["one_thread_in_libraries", "one_thread_in_onnxruntime"]


def one_thread_in_libraries() -> None:
    """Set the number of threads of OpenMP, which torch reads when it is imported, and of OpenBLAS."""
    if not os.environ.get("QIE_SOAK"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class OneThread(ort.SessionOptions):  # type: ignore[misc]
    """Options whose 0 threads, one per core, are one."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 0

    @property
    def intra_op_num_threads(self) -> Any:
        return super().intra_op_num_threads

    @intra_op_num_threads.setter
    def intra_op_num_threads(self, threads: int) -> None:
        ort.capi.onnxruntime_pybind11_state.SessionOptions.intra_op_num_threads.fset(self, threads or 1)


def one_thread_in_onnxruntime(patch: pytest.MonkeyPatch) -> None:
    """Run the sessions of this process on one thread unless they ask for a number."""
    if not os.environ.get("QIE_SOAK"):
        patch.setattr(ort, "SessionOptions", OneThread)
