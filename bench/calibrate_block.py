"""Calibrates one block of the published transformer: ``python bench/calibrate_block.py [--samples N] [--json FILE]``.

The block has the published width (3072, 24 heads) and random weights, the samples 1024 + 1024 image tokens and 256 of
text. Seconds and the peak of memory of the process are measured, and extrapolated to 60 blocks.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from qie.compiler.checkpoint.configs import TransformerConfig
from qie.compiler.graphs.transformer import transformer
from qie.compiler.quantization.blockwise import Values
from qie.compiler.quantization.observe import Observer
from qie.engines.bundle.specs import RotarySpec
from qie.engines.inputs.feeds import transformer_feed

BLOCKS = 60
GRID = (32, 32)
TEXT = 256


class Random:
    """Random bfloat16 tensors of the shapes that a graph wants, as a checkpoint stores them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def read(self, name: str) -> Any:
        shape = self._shapes[name]
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.02
        drawn = np.random.default_rng(len(name)).standard_normal(shape, np.float32)
        return (drawn * np.float32(scale) + np.float32(name.endswith("norm.weight"))).astype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    config = TransformerConfig(
        layers=2, heads=24, head_dim=128, joint_width=3584, in_channels=64, axes_dims=(16, 56, 56), zero_cond_t=True
    )
    graph = transformer(config, dtype="float32")
    shapes = {w.name: w.shape[::-1] if w.layout == ("transpose",) else w.shape for w in graph.weights}
    observer = Observer(graph, {"transformer": Random(shapes)}, options.samples)
    samples = [inputs(config, seed) for seed in range(options.samples)]
    start = time.perf_counter()
    times = []
    observer.run(samples, lambda what, done, total: times.append(time.perf_counter() - start), limit=2)
    found = {
        "cores": os.cpu_count(),
        "samples": options.samples,
        "image_tokens": 2 * GRID[0] * GRID[1],
        "text_tokens": TEXT,
        "block_seconds": times[1] - times[0],
        "all_blocks_hours": BLOCKS * (times[1] - times[0]) / 3600,
        "peak_bytes": peak_bytes(),
        "linears": len(observer.amax),
    }
    print(
        f"{found['cores']} cores, {options.samples} samples of {found['image_tokens']} image and {TEXT} text tokens\n"
        f"one block {found['block_seconds']:.0f} s, {BLOCKS} blocks {found['all_blocks_hours']:.1f} h, peak "
        f"{found['peak_bytes'] / 1e9:.2f} GB"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def inputs(config: TransformerConfig, seed: int) -> Values:
    """What the transformer reads, from a normal distribution."""
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
    """The most that this process held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
