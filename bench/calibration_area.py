"""Whether ranges depend on the area of the samples: ``python -m bench.calibration_area [--samples N]``.

The pocket model is calibrated with samples of its own area and of smaller ones, and again at its own area with other
noise, and quantized with each; the linears that its own calibration excludes stay as they are. Compared are the
relative L2 error of the velocity at every step, and the PSNR of the edits.
"""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bench.pocket_quality import edit
from bench.quantization import TEACHER_FORCED, VARIANTS, Variant, build, record, teacher_forced_errors, uncached_editor
from bench.report import argument_parser, write_report
from pocket.judge import cases, score
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.packing.calibrate import IMAGES
from qie.compiler.planning.calibration import SAMPLES
from qie.compiler.quantization.calibration import Calibration, read_calibration, write_calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.samples import draw_samples, read_images
from qie.engines.terminal import table

TRIES: dict[str, tuple[int, int]] = {
    "128 x 128": (128, 0), "128 x 128, other noise": (128, 1000), "128 x 128, other noise again": (128, 2000),
    "96 x 96": (96, 0), "64 x 64": (64, 0), "32 x 32": (32, 0),
}  # fmt: skip
"""Name -> side of the samples' images, and what is added to the seeds of their noise."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"forward passes, default: {SAMPLES}")
    options = parser.parse_args()
    own = read_calibration(POCKET / "calibration.npz")
    evaluated = list(cases(phrases=1))
    figures: dict[str, Any] = {"samples": options.samples}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exact = uncached_editor(build(POCKET, VARIANTS[0], own, folder / "exact"))
        recordings = [record(exact, c) for c in evaluated[:: len(evaluated) // TEACHER_FORCED][:TEACHER_FORCED]]
        made = {title: calibration(options.samples, *how, own, folder / f"{how}.npz") for title, how in TRIES.items()}
        first = next(iter(made.values()))
        for scheme in ("fp8", "int8-smooth"):
            for title, of_area in made.items():
                bundle = build(POCKET, Variant(name=title, scheme=scheme), of_area, folder / f"{scheme}-{title}")
                with uncached_editor(bundle) as editor:
                    errors, _ = teacher_forced_errors(editor, recordings)
                    scores = score(partial(edit, editor, editor.bundle.manifest.defaults.steps), evaluated)
                psnr = fmean(s.psnr_db for s in scores)
                ratio = float(np.median([of_area.amax[n].max() / first.amax[n].max() for n in first.amax]))
                figures[f"{scheme}, {title}"] = {"velocity": errors, "psnr_db": psnr, "range_ratio_median": ratio}
                rows.append([scheme, title, f"{ratio:.3f}", *(f"{100 * e:.2f} %" for e in errors), f"{psnr:.2f}"])
    header = ["scheme", "samples", "range", *(f"step {number}" for number in range(1, len(errors) + 1)), "PSNR"]
    print(table(rows, header=header, right=range(2, len(header))))
    write_report(options, figures)


def calibration(samples: int, side: int, noise: int, own: Calibration, path: Path) -> Calibration:
    """The calibration over samples of ``side`` x ``side`` pixels, with the exclusions of ``own``."""
    checkpoint = open_checkpoint("pocket")
    areas = replace(checkpoint.model.areas, vae_area=side * side)
    drawn = draw_samples(read_images(IMAGES, samples), INSTRUCTIONS, samples)
    made = measure(
        replace(checkpoint, model=replace(checkpoint.model, areas=areas)),
        checkpoint.readers(),
        [replace(sample, seed=sample.seed + noise) for sample in drawn],
        model=own.model,
    )
    write_calibration(replace(made, exclude=own.exclude), path)
    return read_calibration(path)


if __name__ == "__main__":
    main()
