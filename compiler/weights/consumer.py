"""What a pass over a checkpoint's files gives its tensors to."""

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder

__all__ = ["Consumer"]


class Consumer(Protocol):
    """Takes some of the tensors of a checkpoint, in whatever order a pass over its files reads them."""

    @property
    def sources(self) -> Sequence[tuple[Subfolder, str]]:
        """Subfolder and name of every tensor that it takes."""
        ...

    def take(self, subfolder: Subfolder, name: str, tensor: NDArray[Any]) -> None:
        """Take one tensor, which must not change any more."""
        ...

    def finish(self) -> None:
        """Complete what was made of the tensors; called after the last."""
        ...
