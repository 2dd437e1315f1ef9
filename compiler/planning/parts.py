"""In how many parts a component is built, so that building it fits into the host's memory.

An engine compiler holds all weights of an engine at once, and more of them than once (``host_factor`` of ``BACKENDS``).
A component whose weights are too many is built as several consecutive engines, one after the other.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.graphs.parts import balanced, block_bytes, split
from qie.compiler.recipe.schema import DIVISIBLE, BackendName, Recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.backends import BACKENDS
from qie.engines.errors import BuildError, RecipeError
from qie.engines.machine import GIB, memory_bytes

__all__ = ["HOST_BASE", "build_bytes", "divided", "host_memory", "io_bytes", "tensor_bytes"]

HOST_BASE = 200_000_000
"""Private memory of a building process beside its weights, measured with the ``host_factor`` of ``BACKENDS``."""

HOST_TENSORS = 2
"""Backends that compile nothing hold one tensor at a time and its copy: measured 0.40 GB with onnxruntime for a
transformer whose largest tensor has 0.15 GB."""

MARGIN = 0.1
"""Fraction of the machine's memory that a build leaves to the system and to others."""

LOW, HIGH = 0.25, 4096
"""Memory in GiB that can be chosen."""


def host_memory(recipe: Recipe, memory_gib: float | None) -> int:
    """Bytes of host memory that a build may use.

    Args:
        recipe: the recipe, whose ``limits.host_memory_gib`` bounds what is not chosen.
        memory_gib: what was chosen; None for nine tenths of the memory of this machine, or of its container.

    Raises:
        BuildError: no build can have that.
    """
    if memory_gib is not None:
        if not LOW <= memory_gib <= HIGH:
            raise BuildError(
                f"{memory_gib:g} GiB of host memory were chosen, expected {LOW:g} to {HIGH:g}; choose what the build "
                "may use",
                option="memory_gib",
            )
        return int(memory_gib * GIB)
    here = int((1 - MARGIN) * memory_bytes())
    limit = recipe.limits.host_memory_gib
    return here if limit is None else min(here, int(limit * GIB))


def build_bytes(backend: BackendName, graph: Graph, weights: int) -> int:
    """Host memory that building one engine takes.

    Args:
        backend: of the engine.
        graph: of the engine.
        weights: bytes of the weights of what the engine is made from.
    """
    factor = BACKENDS[backend].host_factor
    if factor is not None:
        return HOST_BASE + int(factor * weights)
    largest = max(tensor_bytes(w.shape, w.dtype) for w in graph.weights)
    return HOST_BASE + HOST_TENSORS * largest


def divided(graph: Graph, recipe: Recipe, backends: Sequence[BackendName], memory: int) -> tuple[Graph, ...]:
    """The parts in which ``graph`` is built: the recipe's number, else the fewest whose builds take ``memory`` at most.

    Where none is small enough, the graph stays whole.

    Args:
        graph: of a component, quantized as the recipe says.
        recipe: the recipe.
        backends: that engines are built for.
        memory: bytes of host memory.

    Raises:
        RecipeError: the recipe has more parts than the component has blocks.
    """
    component, count = graph.component, recipe.components[graph.component].parts
    if component not in DIVISIBLE or not _from_graph(backends):
        return (graph,)
    if count is None and _needed(total_bytes(graph.weights), backends) <= memory:
        return (graph,)
    sizes = block_bytes(graph)
    if count is not None and count > len(sizes):
        raise RecipeError(
            f"components.{component}.parts is {count}, and {component} has {len(sizes)} blocks; lower it",
            option="gpu",
        )
    if count is None:
        counts = range(2, len(sizes) + 1)
        fitting = (n for n in counts if _needed(_largest(sizes, balanced(sizes, n)), backends) <= memory)
        count = next(fitting, 1) if _needed(max(sizes), backends) <= memory else 1
    return split(graph, count)


def io_bytes(parts: Sequence[Graph], sizes: Mapping[str, int]) -> int:
    """Bytes of the inputs and outputs of all parts, each once, and of the hidden states between them.

    Hidden states take turns in two sets of tensors (``qie.engines.sessions.parts``), those with the tokens of a prompt
    in as many again, because a negative prompt has another length.
    """
    hidden = [
        {spec.name for spec in part.outputs} & {spec.name for spec in after.inputs} for part, after in pairwise(parts)
    ]
    between = set().union(*hidden)
    ends = {spec.name: spec for part in parts for spec in (*part.inputs, *part.outputs) if spec.name not in between}
    crossing = [spec for spec in parts[0].outputs if spec.name in hidden[0]]
    states = sum(
        tensor_bytes(spec.shape(sizes), spec.dtype) * (1 if "latent_tokens" in spec.dims else 2) for spec in crossing
    )
    return sum(tensor_bytes(spec.shape(sizes), spec.dtype) for spec in ends.values()) + min(len(hidden), 2) * states


def tensor_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].numpy().itemsize


def _from_graph(backends: Sequence[BackendName]) -> list[BackendName]:
    return [backend for backend in backends if BACKENDS[backend].source == "graph"]


def _needed(weights: int, backends: Sequence[BackendName]) -> int:
    """Host memory of the backend that takes most; 0 where none holds all weights."""
    factors = [BACKENDS[backend].host_factor for backend in _from_graph(backends)]
    return max((HOST_BASE + int(factor * weights) for factor in factors if factor is not None), default=0)


def _largest(sizes: Sequence[int], blocks: Sequence[int]) -> int:
    """The largest sum of so many ``sizes`` one after the other."""
    rest = iter(sizes)
    return max(sum(next(rest) for _ in range(count)) for count in blocks)
