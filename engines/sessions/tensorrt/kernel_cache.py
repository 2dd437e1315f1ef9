"""The cache of kernels: TensorRT for RTX compiles for the GPU that it runs on, and the next process need not."""

import contextlib
from pathlib import Path
from typing import Any

from qie.engines.files import qie_home, replacing

__all__ = ["KernelCache", "cache_path"]


def cache_path(backend: str, key: str, gpu: str) -> Path:
    """The file of the kernels of the engine with ``key`` for the GPU named ``gpu``."""
    name = "".join(c if c.isalnum() else "-" for c in gpu.lower())
    return qie_home() / "cache" / backend / f"{key[:32]}-{name}.bin"


class KernelCache:
    """TensorRT's cache of kernels and its file; where the file cannot be written, the next process compiles again.

    Attributes:
        cache: TensorRT's object, which contexts made with it use until they are destroyed.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self.cache, self._path = cache, path
        self._saved = b""

    def load(self, config: Any) -> None:
        """Give contexts of ``config`` what an earlier process compiled.

        TensorRT refuses files of another driver or version.
        """
        cache = self.cache
        with contextlib.suppress(OSError):
            content = self._path.read_bytes()
            if cache.deserialize(content):
                self._saved = content
        config.set_runtime_cache(cache)

    def save(self) -> None:
        """Write the file if kernels were compiled since it was loaded or written.

        TensorRT gives nothing to write where the thread has no CUDA context.
        """
        cache = self.cache
        serialized = cache.serialize()
        content = b"" if serialized is None else bytes(serialized)
        if not content or content == self._saved:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as temporary:
                temporary.write_bytes(content)
            self._saved = content
