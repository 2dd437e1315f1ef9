"""Host memory of a calibration, which runs a component block by block (``qie.compiler.quantization.blockwise``)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.graph import DTYPES, Graph
from qie.compiler.planning.cost import Cost
from qie.compiler.quantization.blockwise import COPIED, Segment, segments
from qie.engines.bundle.manifest import Component
from qie.engines.errors import BuildError
from qie.engines.machine import GIB

__all__ = ["CalibrationMemory", "calibration_memory", "memory_refusal"]

BASE = 300_000_000
"""Memory of the process: Python, onnx, onnxruntime and the graphs. With it the sum is 2.76 GB for the published 2511 at
384 x 384, where 2.38 GB were measured on four blocks of that width (``bench.calibration``)."""

COPIES = 6
"""How often a segment's float32 weights are held where they are initializers: measured 0.45 GB for the 0.077 GB of a
published VAE's encoder."""

STORED = 2
"""Bytes of a weight in the checkpoint: bfloat16, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationMemory:
    """Peak host memory of one component's calibration.

    Attributes:
        component: the component.
        block_bytes: a block in float32, or a table of which rows are taken.
        next_bytes: what is read of the next block meanwhile, with its modulation.
        samples_bytes: values of all samples.
        run_bytes: what one run of the block computes.
    """

    component: Component
    block_bytes: int
    next_bytes: int
    samples_bytes: int
    run_bytes: int

    @property
    def bytes(self) -> int:
        """All, with ``BASE``."""
        return BASE + self.block_bytes + self.next_bytes + self.samples_bytes + self.run_bytes

    @property
    def terms(self) -> str:
        """The sum, for people."""
        terms = [
            ("the process", BASE),
            ("its block in float32", self.block_bytes),
            ("the next block as stored", self.next_bytes),
            ("the samples", self.samples_bytes),
            ("a run", self.run_bytes),
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
    modulation = config.modulation_rows * config.width**2 if graph.component == "transformer" else 0
    widths = {"transformer": config.width, "language": model.language.width, "vision": model.vision.width}
    coming = [_stored(segment, modulation) for segment in cut[1:]]
    block, after = max(
        zip((_held(segment) for segment in cut), [*coming, 0], strict=True), key=lambda both: both[0] + both[1]
    )
    wider = 4 // DTYPES[graph.dtype].numpy().itemsize
    tokens = max(sizes.get(name, 0) for name in ("tokens", "prompt_tokens", "patches"))
    hidden = 4 * tokens * widths.get(graph.component, 0)
    return CalibrationMemory(
        component=graph.component,
        block_bytes=block,
        next_bytes=after,
        samples_bytes=samples * (wider * counted.io_bytes + hidden),
        run_bytes=wider * (counted.activation_bytes - counted.scores_bytes) + counted.scores_bytes,
    )


def _held(segment: Segment) -> int:
    """Bytes of a segment's weights while it runs."""
    tables = segment.rows
    wide = 4 * sum(math.prod(weight.shape) for weight in segment.weights if weight.name not in tables)
    rows = STORED * sum(math.prod(weight.shape) for weight in segment.weights if weight.name in tables)
    return rows + (COPIES * wide if wide <= COPIED else wide)


def _stored(segment: Segment, modulation: int) -> int:
    """Bytes of a segment's weights as they are read."""
    return STORED * (modulation + sum(math.prod(weight.shape) for weight in segment.weights))


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
