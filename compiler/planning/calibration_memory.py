"""Host memory of a calibration, which runs a component block by block (``qie.compiler.quantization.blockwise``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.planning.cost import Cost
from qie.compiler.quantization.blockwise import COPIED, Segment, segments
from qie.engines.bundle.manifest import Component
from qie.engines.bundle.modulation_rows import MODULES, ROWS
from qie.engines.errors import BuildError
from qie.engines.machine import GIB

__all__ = ["CalibrationMemory", "calibration_memory", "memory_refusal"]

BASE = 700_000_000
"""Memory of the process: Python, onnx, onnxruntime, and what they hold beyond the terms below. With it the sums for
the published 2511 are 2.62 GB at 384 x 384 and 2.86 GB at 448 x 448, where 2.84 GB were measured with all 60 blocks;
with eight blocks 2.37 GB at 384 x 384, as measured (2 cores, onnxruntime 1.32)."""

NODE = 20_000
"""Memory of a node of a graph, which several graphs hold: the process has 576 MB with the 11,593 nodes of the published
transformer before it reads a weight, and 382 MB with 1,297."""

COPIES = 6
"""How often a segment's float32 weights are held where they are initializers: measured 0.45 GB for the 0.077 GB of a
published VAE's encoder."""

MODULATION = 4
"""Bytes for each of a block's modulation weights: all as stored, and one of its two linears in float32."""

STORED = 2
"""Bytes of a weight in the checkpoint: bfloat16, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationMemory:
    """Peak host memory of one component's calibration.

    Attributes:
        component: the component.
        graph_bytes: its graphs.
        block_bytes: a block in float32, or a table of which rows are taken.
        samples_bytes: values of all samples.
        run_bytes: what one run of the block computes, or what is read to compute its modulation.
    """

    component: Component
    graph_bytes: int
    block_bytes: int
    samples_bytes: int
    run_bytes: int

    @property
    def bytes(self) -> int:
        """All, with ``BASE``."""
        return BASE + self.graph_bytes + self.block_bytes + self.samples_bytes + self.run_bytes

    @property
    def terms(self) -> str:
        """The sum, for people."""
        terms = [
            ("the process", BASE + self.graph_bytes),
            ("its block in float32", self.block_bytes),
            ("the samples", self.samples_bytes),
            ("a run, or modulation", self.run_bytes),
        ]
        return " + ".join(f"{_gib(count)} for {what}" for what, count in terms)


def memory_refusal(memory: CalibrationMemory, most: int) -> BuildError | None:
    """Why a calibration does not fit into ``most`` bytes of host memory; None where it does."""
    if memory.bytes <= most:
        return None
    return BuildError(
        f"calibrating {memory.component} takes about {_gib(memory.bytes)} of host memory ({memory.terms}), and the "
        f"build may use {_gib(most)}; calibrate on a machine with more memory and give the build that calibration",
        option="memory_gib",
    )


def calibration_memory(
    graph: Graph, counted: Cost, sizes: Mapping[str, int], model: Model, *, samples: int
) -> CalibrationMemory:
    """The peak memory of ``graph``, where one of ``samples`` runs costs ``counted`` at ``sizes``.

    Args:
        graph: of a component, in the dtype of the recipe, quantized or not.
        counted: of one run, with the scores of attention.
        sizes: the free dims of its inputs.
        model: the widths of its components.
        samples: forward passes.
    """
    cut = segments(graph)
    config = model.transformer
    linears = len(set(MODULES.values())) if graph.component == "transformer" else 0
    modulation = linears * ROWS * config.width**2
    widths = {"transformer": config.width, "language": model.language.width, "vision": model.vision.width}
    wider = 4 // DTYPES[graph.dtype].numpy().itemsize
    tokens = max(sizes.get(name, 0) for name in ("tokens", "prompt_tokens", "patches"))
    hidden = 4 * tokens * widths.get(graph.component, 0)
    run = wider * (counted.activation_bytes - counted.scores_bytes) + counted.scores_bytes
    return CalibrationMemory(
        component=graph.component,
        graph_bytes=NODE * sum(len(segment.nodes) for segment in cut),
        block_bytes=max(_held(segment) for segment in cut),
        samples_bytes=samples * (wider * counted.io_bytes + hidden),
        run_bytes=max(run, MODULATION * modulation),
    )


def _held(segment: Segment) -> int:
    """Bytes of a segment's weights while it runs."""
    tables = segment.rows
    wide = 4 * sum(math.prod(weight.shape) for weight in segment.weights if weight.name not in tables)
    rows = STORED * sum(math.prod(weight.shape) for weight in segment.weights if weight.name in tables)
    return rows + (COPIES * wide if wide <= COPIED else wide)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
