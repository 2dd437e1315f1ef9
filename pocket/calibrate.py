"""Calibrate the pocket model: ``python -m pocket.calibrate CHECKPOINT [--evidence FILE]``.

The samples are images and instructions as in training, none of them held out. The calibration is written into the
folder of the checkpoint, where ``qie build pocket`` finds it, and the sensitivity ranking of the transformer's linears
into FILE.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.data.examples import draw_example
from pocket.data.images import SIDE
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.quantization.calibration import FILE
from qie.compiler.quantization.measure import calibrate_model
from qie.compiler.quantization.samples import NEGATIVE_EVERY, CalibrationSample
from qie.compiler.quantization.sensitivity import describe

SAMPLES = 96
"""Number of samples."""

SIZES = ((SIDE, SIDE), (96, 160), (160, 96))
"""(height, width) of the samples' images, in turn."""

BUDGET = 0.02
"""Relative L2 error of the velocity that quantization may cause."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"relative L2 error budget, default: {BUDGET}")
    parser.add_argument("--evidence", type=Path, help="JSON file for the sensitivity ranking")
    options = parser.parse_args()
    _, rankings = calibrate_model(
        open_checkpoint(str(options.checkpoint)),
        calibration_samples(),
        options.checkpoint / FILE,
        schemes=("fp8", "int8-smooth"),
        budget=options.budget,
        ranking=options.evidence,
        ranking_samples=24,
    )
    for ranking in rankings:
        print(describe(ranking))


def calibration_samples() -> tuple[CalibrationSample, ...]:
    """Calibration samples from training examples, spread evenly over the schedule."""
    rng = np.random.default_rng(11)
    order = rng.permutation(SAMPLES)
    examples = [draw_example(rng, *SIZES[number % len(SIZES)], images=1) for number in range(SAMPLES)]
    return tuple(
        CalibrationSample(
            image=Image.fromarray(example.images[0]),
            text=" " if number % NEGATIVE_EVERY == NEGATIVE_EVERY - 1 else example.text,
            position=(int(order[number]) + 0.5) / SAMPLES,
            seed=number,
        )
        for number, example in enumerate(examples)
    )


if __name__ == "__main__":
    main()
