"""Calibration of one block of the published transformer: ``python -m bench.calibrate_block [--samples N]``.

The block has the published width (3072, 24 heads) and random weights; a sample has 1024 + 1024 image tokens and 256
text tokens. The benchmark measures the time and the peak memory of the process, and extrapolates the time to 60 blocks.
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.report import argument_parser, environment, write_report
from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.graphs.transformer import transformer
from qie.compiler.quantization.blockwise import Values
from qie.compiler.quantization.statistics import LinearStatistics
from qie.engines.bundle.specs import RotarySpec
from qie.engines.inputs.feeds import transformer_feed
from qie.engines.terminal import table

BLOCKS = 60
"""Blocks of the published transformer."""

GRID = (32, 32)
"""Rows and columns of tokens of an image of 512x512 pixels."""

TEXT = 256
"""Text tokens of a prompt."""


class RandomReader:
    """A ``TensorReader`` of random bfloat16 tensors with the given shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def order(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    def read(self, name: str) -> Any:
        shape = self._shapes[name]
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.02
        values = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
        return (values * np.float32(scale) + np.float32(name.endswith("norm.weight"))).astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=8, help="number of samples, default: 8")
    options = parser.parse_args()
    config = TransformerConfig(
        layers=2, heads=24, head_dim=128, joint_width=3584, in_channels=64, axes_dims=(16, 56, 56), zero_cond_t=True
    )
    graph = transformer(config, dtype="float32")
    shapes = {w.name: w.shape[::-1] if w.layout == ("transpose",) else w.shape for w in graph.weights}
    statistics = LinearStatistics(graph, {"transformer": RandomReader(shapes)}, options.samples)
    samples = [inputs(config, seed) for seed in range(options.samples)]
    start = time.perf_counter()
    times = []
    statistics.run(samples, lambda what, done, total: times.append(time.perf_counter() - start), limit=2)
    figures = {
        "samples": options.samples,
        "image_tokens": 2 * GRID[0] * GRID[1],
        "text_tokens": TEXT,
        "block_seconds": times[1] - times[0],
        "all_blocks_hours": BLOCKS * (times[1] - times[0]) / 3600,
        "peak_bytes": peak_bytes(),
        "linears": len(statistics.amax),
    }
    machine = environment()
    rows = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores"],
        ["samples", f"{options.samples} of {figures['image_tokens']} image and {TEXT} text tokens"],
        ["one block", f"{figures['block_seconds']:.0f} s"],
        [f"{BLOCKS} blocks, extrapolated", f"{figures['all_blocks_hours']:.1f} h"],
        ["peak memory", f"{figures['peak_bytes'] / 1e9:.2f} GB"],
    ]
    print(table(rows))
    write_report(options, figures)


def inputs(config: TransformerConfig, seed: int) -> Values:
    """Inputs of the transformer from a normal distribution."""
    rng = np.random.default_rng(seed)
    tokens = GRID[0] * GRID[1]

    def draw(*shape: int, scale: float = 1.0) -> Any:
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    return transformer_feed(
        latents_BNC=draw(1, tokens, 64),
        reference_BRC=draw(1, tokens, 64),
        prompt_BLD=draw(1, TEXT, config.joint_width),
        rotary=RotarySpec(axes_dims=config.axes_dims),
        grids=[GRID, GRID],
        modulation_YM=1 + draw(config.layers, config.modulation_rows * config.width, scale=0.2),
        modulation_out_O=1 + draw(2 * config.width, scale=0.2),
        dsigma=-0.02,
    )


def peak_bytes() -> int:
    """Peak resident memory of this process, from the kernel."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024


if __name__ == "__main__":
    main()
