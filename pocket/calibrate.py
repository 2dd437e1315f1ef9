"""Calibrate the pocket model: ``python -m pocket.calibrate CHECKPOINT [--evidence FILE]``.

Over pictures and instructions as it was trained on, none of them held out; the file lies in the checkpoint's folder,
where ``qie build pocket`` finds it. FILE gets the ranking of the transformer's linears.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.photographs import SIDE
from pocket.samples import sample
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.cli.calibrate import describe
from qie.compiler.quantization.calibration import FILE, write_calibration
from qie.compiler.quantization.samples import NEGATIVE, CalibrationSample
from qie.compiler.quantization.sensitivity import measure

SAMPLES = 96

SHAPES = ((SIDE, SIDE), (96, 160), (160, 96))
"""(height, width) of pictures, by turns."""

BUDGET = 0.02
"""Relative L2 of the velocity that quantization may bring."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--evidence", type=Path, help="JSON file for the ranking")
    options = parser.parse_args()
    calibration, rankings = measure(
        open_checkpoint(str(options.checkpoint)),
        draw(),
        schemes=("fp8", "int8-smooth"),
        budget=options.budget,
        ranking_samples=24,
    )
    write_calibration(calibration, options.checkpoint / FILE)
    if options.evidence is not None:
        options.evidence.write_text(json.dumps([r.facts() for r in rankings], indent=1) + "\n", encoding="utf-8")
    for ranking in rankings:
        print(describe(ranking))


def draw() -> tuple[CalibrationSample, ...]:
    """Samples as the model was trained on, evenly over the schedule."""
    rng = np.random.default_rng(11)
    order = rng.permutation(SAMPLES)
    drawn = [sample(rng, *SHAPES[number % len(SHAPES)], pictures=1) for number in range(SAMPLES)]
    return tuple(
        CalibrationSample(
            image=Image.fromarray(one.images[0]),
            text=" " if number % NEGATIVE == NEGATIVE - 1 else one.text,
            share=(int(order[number]) + 0.5) / SAMPLES,
            seed=number,
        )
        for number, one in enumerate(drawn)
    )


if __name__ == "__main__":
    main()
