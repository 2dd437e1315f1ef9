"""Cache keys: the sha256 of everything that decides a graph or an engine, and the engines that need no new build."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxscript
from numpy.typing import NDArray

import qie
from qie.compiler.backends import BUILDERS
from qie.compiler.planning.plan import Plan, recipe_schedules
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import Source
from qie.engines.bundle.manifest import Component, ProfileRecord
from qie.engines.records import to_plain

__all__ = ["engine_key", "graph_keys", "modulation_key", "source_key", "whole_key"]


def graph_keys(plan: Plan, digest: str) -> dict[Component, tuple[str, ...]]:
    """The key of the graph and weights of each part of each component; ``digest`` is the checkpoint's.

    Components whose engines are made from one text encoder share its files, so all of them decide each one's key.
    """
    loras = [[lora.digest(), lora.weight] for lora in plan.loras]
    versions = {"qie": qie.__version__, "onnx": onnx.__version__, "onnxscript": onnxscript.__version__}
    keys = {
        planned.component: tuple(
            _sha256(
                {
                    "graph": part.digest(),
                    "checkpoint": digest,
                    "loras": loras if planned.component == "transformer" else [],
                    "section": [planned.precision, planned.scheme],
                    "smoothing": {name: _sha256_of(values) for name, values in planned.smoothing_scales.items()},
                    "versions": versions,
                }
            )
            for part in planned.parts
        )
        for planned in plan.components
    }
    shared = {p.component: whole_key(keys[p.component]) for p in plan.components if p.in_text_encoder}
    return keys | {component: (_sha256({"component": component, "text_encoder": shared}),) for component in shared}


def whole_key(keys: Sequence[str]) -> str:
    """The key of a component's graph and weights as a whole, where its parts have ``keys``."""
    return keys[0] if len(keys) == 1 else _sha256({"parts": list(keys)})


def modulation_key(plan: Plan, digest: str) -> str:
    """The key of the modulation's files; ``digest`` is the checkpoint's."""
    transformer = next(planned for planned in plan.components if planned.component == "transformer")
    return _sha256(
        {
            "checkpoint": digest,
            "loras": [[lora.digest(), lora.weight] for lora in plan.loras],
            "smoothing": {name: _sha256_of(values) for name, values in transformer.smoothing_scales.items()},
            "schedules": [_sha256_of(values) for values in recipe_schedules(plan.model, plan.recipe)],
            "stored": [plan.recipe.modulation, transformer.precision],
            "versions": {"qie": qie.__version__, "numpy": np.__version__},
        }
    )


def source_key(graph: str, source: Source, shapes: tuple[ProfileRecord, ...]) -> str:
    """The key of what an engine is made from, where ``graph`` is that of the component's graph and weights.

    Another source than a graph has the largest shapes in it.
    """
    return graph if source == "graph" else _sha256({"graph": graph, "source": source, "shapes": to_plain(shapes)})


def engine_key(
    graph: str, backend: str, recipe: Recipe, shapes: tuple[ProfileRecord, ...], *, version: str | None = None
) -> str:
    """The key of an engine: that of its graph, its target and, on a GPU, its shapes and limits.

    ``version`` is that of the backend that built it; None for the installed one.
    """
    version = version or BUILDERS[backend].version()
    decided_by: dict[str, Any] = {"graph": graph, "target": [backend, recipe.compute_capability, version]}
    if recipe.compute_capability is not None:
        decided_by["shapes"] = to_plain(shapes)
        decided_by["limits"] = [recipe.memory_gib, recipe.limits.build_workspace_gib]
    return _sha256(decided_by)


def _sha256_of(values: NDArray[np.float32]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _sha256(decided_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()
