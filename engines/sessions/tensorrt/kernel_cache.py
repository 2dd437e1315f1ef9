"""The cache of kernels: TensorRT for RTX compiles for the GPU that it runs on, and the next process need not."""

import contextlib
from pathlib import Path
from typing import Any

from qie.engines.errors import BundleError
from qie.engines.files import qie_home, replacing

__all__ = ["KernelCache", "cache_path"]


REFUSALS = (OSError, RuntimeError, TypeError)
"""What the file and TensorRT's bindings raise: the next process compiles again then, and the edit goes on."""


def cache_path(backend: str, key: str, gpu: str) -> Path | None:
    """The file of the kernels of the engine with ``key`` for the GPU named ``gpu``; None where there is no home."""
    name = "".join(c if c.isalnum() else "-" for c in gpu.lower())
    try:
        return qie_home() / "cache" / backend / f"{key[:32]}-{name}.bin"
    except BundleError:
        return None


class KernelCache:
    """TensorRT's cache of kernels and its file; where the file cannot be written, the next process compiles again.

    Attributes:
        cache: TensorRT's object, which contexts made with it use until they are destroyed.
    """

    def __init__(self, cache: Any, path: Path | None) -> None:
        """Use ``open``."""
        self.cache, self._path = cache, path
        self._saved = b""

    @classmethod
    def open(cls, config: Any, path: Path | None) -> "KernelCache | None":
        """A cache for contexts of ``config``, with what an earlier process compiled; None where TensorRT makes none.

        TensorRT refuses files of another driver or version.
        """
        cache = None
        with contextlib.suppress(*REFUSALS):
            cache = config.create_runtime_cache()
        if cache is None:
            return None
        kernels = cls(cache, path)
        with contextlib.suppress(*REFUSALS):
            if path is not None:
                content = path.read_bytes()
                if cache.deserialize(content):
                    kernels._saved = content
        config.set_runtime_cache(cache)
        return kernels

    def save(self) -> None:
        """Write the file if kernels were compiled since it was loaded or written.

        TensorRT gives nothing to write where the thread has no CUDA context.
        """
        cache = self.cache
        with contextlib.suppress(*REFUSALS):
            serialized = cache.serialize() if self._path is not None else None
            content = b"" if serialized is None else bytes(serialized)
            if self._path is None or not content or content == self._saved:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                temporary.write_bytes(content)
            self._saved = content
