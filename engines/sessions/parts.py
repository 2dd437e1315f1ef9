"""Components in parts: several consecutive engines of one backend behind the interface of one.

Hidden states go from part to part in the memory of the backend. Their tensors are allocated for the shapes of a run and
kept for the next one of these shapes, so a loop runs with the same tensors every time. A cut uses the tensors of the
cut before the last, which nothing reads any more.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import EngineRecord
from qie.engines.sessions.session import Session, Tensor

__all__ = ["PartsSession"]

SHAPES_KEPT = 2
"""Sets of shapes whose hidden states are kept: of the passes with the prompt and with the negative prompt."""

Key = tuple[int, int, tuple[int, ...]]
"""Which of two turns, number of the hidden state, and its shape."""


class PartsSession:
    """The sessions of the parts of one component, run one after the other."""

    def __init__(self, sessions: Sequence[Session], records: Sequence[EngineRecord]) -> None:
        """Chain ``sessions``, which this session closes, of the engines ``records``."""
        self._sessions, self._records = tuple(sessions), tuple(records)
        self._made = {spec.name: session for session, record in self._each() for spec in record.outputs}
        self._hidden = [
            [spec for spec in before.outputs if spec.name in {other.name for other in after.inputs}]
            for before, after in pairwise(records)
        ]
        self._kept: OrderedDict[tuple[tuple[str, int], ...], dict[Key, Tensor]] = OrderedDict()

    def _each(self) -> Iterator[tuple[Session, EngineRecord]]:
        return zip(self._sessions, self._records, strict=True)

    @property
    def rebinds(self) -> bool:
        """Whether a run may take other tensors than the run before at no cost."""
        return all(session.rebinds for session in self._sessions)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A tensor with the content of ``array``, which every part can read."""
        return self._sessions[0].upload(array)

    def empty(self, name: str, sizes: Mapping[str, int]) -> Tensor:
        """A tensor for the output ``name`` where ``sizes`` gives the free dims."""
        return self._made[name].empty(name, sizes)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Give ``target`` the content of ``source``, within the memory of the backend."""
        self._sessions[0].copy(source, target)

    def download(self, tensor: Tensor) -> NDArray[np.generic]:
        """The content of ``tensor``."""
        return self._sessions[0].download(tensor)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of ``tensor``."""
        return self._sessions[0].shape(tensor)

    def run(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Run every part, each with those of ``inputs`` that it reads.

        Raises:
            RequestError: a shape is outside the engines' profiles.
            EngineError: the backend failed or ran out of memory.
        """
        every = {**inputs, **self._states(inputs), **outputs}
        for session, record in self._each():
            session.run(
                {spec.name: every[spec.name] for spec in record.inputs},
                {spec.name: every[spec.name] for spec in record.outputs},
            )

    def unload(self) -> bool:
        """Give the memory of all weights and of hidden states back; False where a part cannot."""
        self._kept.clear()
        unloaded = [session.unload() for session in self._sessions]
        return all(unloaded)

    def close(self) -> None:
        """Release the engines and their memory."""
        self._kept.clear()
        with ExitStack() as stack:  # no failure skips what is left
            for session in self._sessions:
                stack.callback(session.close)

    def _states(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the hidden states of a run, by name."""
        sizes = self._sizes(inputs)
        shapes = tuple(sorted(sizes.items()))
        known = {key: tensor for kept in self._kept.values() for key, tensor in kept.items()}
        if shapes not in self._kept and len(self._kept) == SHAPES_KEPT:
            self._kept.popitem(last=False)
        used = self._kept.setdefault(shapes, {})
        self._kept.move_to_end(shapes)
        states = {}
        for cut, specs in enumerate(self._hidden):
            for number, spec in enumerate(specs):
                key = cut % 2, number, spec.shape(sizes)
                if key not in used:
                    used[key] = known[key] if key in known else self.empty(spec.name, sizes)
                states[spec.name] = used[key]
        return states

    def _sizes(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The free dims of a run."""
        sizes: dict[str, int] = {}
        for record in self._records:
            for spec in record.inputs:
                if spec.name in inputs:
                    shape = self.shape(inputs[spec.name])
                    sizes |= {dim: size for dim, size in zip(spec.dims, shape, strict=True) if isinstance(dim, str)}
        if "noise_tokens" in sizes:
            sizes["latent_tokens"] = sizes["noise_tokens"] + sizes["reference_tokens"]
        return sizes
