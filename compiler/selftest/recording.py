"""Recorded runs of engines: what went in and came out, to be run again elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component
from qie.engines.editing.stages import Stages
from qie.engines.sessions.session import Session

__all__ = ["RecordingStages", "Run"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The inputs and outputs of one run of an engine."""

    component: Component
    inputs: Arrays
    outputs: Arrays


class RecordingStages(Stages):
    """Stages that append every run to ``runs``."""

    def __init__(self, bundle: Bundle, runs: list[Run]) -> None:
        super().__init__(bundle)
        self._runs = runs

    @contextmanager
    def session(self, component: Component) -> Iterator[Session]:
        """The session of ``component``, recorded."""
        with super().session(component) as session:
            recorded: Any = _Recorder(session, component, self._runs)
            yield recorded


class _Recorder:
    """A session that appends each of its runs to ``runs``."""

    def __init__(self, session: Session, component: Component, runs: list[Run]) -> None:
        self._session, self._component, self._runs = session, component, runs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run, and keep copies of what went in and came out."""
        before = {name: np.array(self._session.download(tensor)) for name, tensor in inputs.items()}
        self._session.run(inputs, outputs)
        after = {name: np.array(self._session.download(tensor)) for name, tensor in outputs.items()}
        self._runs.append(Run(component=self._component, inputs=before, outputs=after))
