"""How well the pocket model edits: ``python bench/pocket_quality.py [--bundle NAME] [--json FILE]``.

Every instruction in every phrasing on held-out photographs, against the exact answer, beside two baselines: the picture
as it was, and the exact answer after a round trip through the VAE, which no editor of this model can beat by much. Then
pairs of edits that were never trained on together, the steps of the schedule, and diffusers with the same noise.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.plot import line_plot
from pocket.data.images import HELD_OUT, center_crop
from pocket.judge import Case, Score, capped_psnr_db, cases, pair_cases, score, views
from qie.compiler.checkpoint.checkpoint import POCKET
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.terminal import table

Rgb = NDArray[np.uint8]
SEED = 7
CURVE = (4, 8, 20, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", default="pocket", help="name or folder of a bundle of the pocket model")
    parser.add_argument("--checkpoint", type=Path, default=POCKET, help="its checkpoint, for diffusers")
    parser.add_argument("--steps", type=int, help="steps of an edit, default the bundle's")
    parser.add_argument("--phrases", type=int, help="phrasings of every instruction, default all")
    parser.add_argument("--no-diffusers", action="store_true", help="leave the comparison with diffusers out")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="SVG file for the curve of quality over steps")
    options = parser.parse_args()
    started = time.perf_counter()
    editor = Editor(open_bundle(options.bundle))
    steps = options.steps or editor.bundle.manifest.defaults.steps
    found: dict[str, Any] = {"bundle": editor.bundle.path.name, "steps": steps}

    found["vae_round_trip_db"] = {
        name: capped_psnr_db(round_trip(editor, center_crop(name)), center_crop(name)) for name in HELD_OUT
    }
    print("\nThe VAE's round trip of held-out photographs, dB")
    rows = [[name, f"{db:.2f}"] for name, db in found["vae_round_trip_db"].items()]
    mean = fmean(found["vae_round_trip_db"].values())
    print(table([*rows, ["mean", f"{mean:.2f}"]], right=(1,)))

    asked = list(cases(phrases=options.phrases))
    scores = score(partial(edit, editor, steps), asked)
    trips = ceiling(editor, asked)
    print(f"\nInstructions, {steps} steps, {len(asked)} edits")
    print_scores(scores, trips)
    found["instructions"] = [{**asdict(s), "vae_psnr_db": trips[s.name]} for s in scores]
    found["nearest"] = fmean(s.nearest for s in scores)

    pairs = list(pair_cases())
    scores = score(partial(edit, editor, steps), pairs)
    print(f"\nPairs that were never trained on together, {steps} steps, {len(pairs)} edits")
    print_scores(scores, ceiling(editor, pairs))
    found["pairs"] = [asdict(s) for s in scores]
    found["pairs_nearest"] = fmean(s.nearest for s in scores)

    few = list(cases(phrases=1))
    found["curve"] = {n: fmean(s.psnr_db for s in score(partial(edit, editor, n), few)) for n in CURVE}
    print("\nSteps, mean over instructions, dB")
    print(table([[str(n), f"{db:.2f}"] for n, db in found["curve"].items()], right=(0, 1)))

    if options.plot is not None:
        line_plot(options.plot, found["curve"], x_label="steps", y_label="mean PSNR, dB")

    if not options.no_diffusers:
        found["diffusers"] = compare(options.checkpoint, editor, steps, few)
    found["seconds"] = round(time.perf_counter() - started, 1)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def edit(editor: Editor, steps: int, images: Sequence[Rgb], text: str) -> Rgb:
    pictures = [Image.fromarray(image) for image in images]
    made = editor.edit(Request(images=pictures, instructions=[text], seeds=[SEED], steps=steps))
    return np.asarray(made.images[0])


def round_trip(editor: Editor, image: Rgb) -> Rgb:
    """Through the VAE and back."""
    return editor.stages.decode(editor.stages.encode([image]))[0]


def ceiling(editor: Editor, asked: Sequence[Case]) -> dict[str, float]:
    """Name -> mean PSNR of the exact answers after a round trip."""
    found: dict[str, list[float]] = {}
    for case in asked:
        found.setdefault(case.name, []).append(capped_psnr_db(round_trip(editor, case.target), case.target))
    return {name: fmean(values) for name, values in found.items()}


def print_scores(scores: Sequence[Score], trips: dict[str, float]) -> None:
    rows = [
        [
            s.name,
            *(f"{v:.2f}" for v in (s.psnr_db, s.unedited_psnr_db, trips[s.name])),
            f"{s.ssim:.3f}",
            f"{s.unedited_ssim:.3f}",
            f"{s.nearest:.1%}",
        ]
        for s in scores
    ]
    means = [fmean(getattr(s, field) for s in scores) for field in ("psnr_db", "unedited_psnr_db")]
    last = [
        "mean",
        *(f"{v:.2f}" for v in (*means, fmean(trips[s.name] for s in scores))),
        f"{fmean(s.ssim for s in scores):.3f}",
        f"{fmean(s.unedited_ssim for s in scores):.3f}",
        f"{fmean(s.nearest for s in scores):.1%}",
    ]
    header = ("instruction", "PSNR", "unedited", "VAE", "SSIM", "unedited", "nearest")
    print(table([*rows, last], header=header, right=range(1, 7)))


def compare(checkpoint: Path, editor: Editor, steps: int, asked: Sequence[Case]) -> dict[str, float]:
    """The same edits by diffusers, from the same noise, on one picture."""
    from qie.compiler.validation.reference import load_reference

    reference = load_reference(checkpoint)
    shown = views()[0].image
    some = [case for case in asked if np.array_equal(case.images[0], shown)]

    def by_diffusers(images: Sequence[Rgb], text: str) -> Rgb:
        pictures = [Image.fromarray(image) for image in images]
        return reference.edit(pictures, text, steps=steps, seed=SEED, cfg=1.0)

    theirs = fmean(s.psnr_db for s in score(by_diffusers, some))
    ours = fmean(s.psnr_db for s in score(partial(edit, editor, steps), some))
    print(f"\n{len(some)} edits of one picture: {ours:.3f} dB by qie's engines, {theirs:.3f} dB by diffusers")
    return {"qie_psnr_db": ours, "diffusers_psnr_db": theirs}


if __name__ == "__main__":
    main()
