"""What a pass over a checkpoint's files gives its tensors to."""

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from qie.compiler.checkpoint.subfolders import Subfolder

__all__ = ["Consumer"]


class Consumer(Protocol):
    """Makes something of tensors that come one by one, in any order."""

    @property
    def sources(self) -> Sequence[tuple[Subfolder, str]]:
        """Subfolder and name of every tensor that it takes."""
        ...

    def take(self, subfolder: Subfolder, name: str, tensor: NDArray[Any]) -> None:
        """Take one tensor, which is only valid during the call."""
        ...

    def finish(self) -> None:
        """Complete what was made of the tensors; called after the last."""
        ...
