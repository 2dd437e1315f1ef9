"""The protocol of a session: a loaded engine, with tensors in the memory of its backend."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Session", "Tensor"]

Tensor = Any
"""A tensor in the memory of a backend; only sessions of that backend can read it."""


class Session(Protocol):
    """One loaded engine: named tensors in, named tensors out.

    The caller allocates the output tensors, so that nothing is allocated inside a loop, and may pass one session's
    output to another session of the same backend without a copy. Work is done in the order of the calls; on a GPU only
    ``download`` waits for it. A backend may keep what it prepared for a set of tensors, so a loop is fastest if it
    passes the same tensors every time and updates them with ``copy``.
    """

    @property
    def rebinds(self) -> bool:
        """Whether a run may take other tensors than the run before at no cost."""

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor with the content of ``array``, which must not change while the tensor is in use."""

    def empty(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """A tensor for the output ``name`` where ``sizes`` gives the free dims."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Give ``target`` the content of ``source``, of the same shape and dtype; nothing passes through the host.

        An array that ``target`` was uploaded from may change with it.
        """

    def download(self, tensor: Tensor) -> NDArray[np.generic]:
        """The content of ``tensor`` as an array that the caller must not write to."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of ``tensor``."""

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Compute ``outputs`` from ``inputs``.

        Raises:
            EngineError: the backend failed or ran out of memory.
        """

    def unload(self) -> bool:
        """Give the memory of the weights back and keep what was prepared; the next run loads them again.

        Returns:
            False where the backend cannot, and nothing has changed.
        """

    def close(self) -> None:
        """Release the engine and its memory; tensors stay. The session must not be used again."""
