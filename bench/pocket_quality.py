"""Edits of the pocket model against the exact results: ``python -m bench.pocket_quality [--bundle NAME]``.

It evaluates every edit in every phrase on held-out photos, beside two baselines: the unedited input, and the exact
result after a round trip through the VAE, which no editor of this model can exceed by much. Then pairs of edits that
training never combined, several numbers of steps, and diffusers with the same noise.
"""

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

from bench.plot import line_plot
from bench.report import argument_parser, write_report
from pocket.data.images import HELD_OUT, center_crop
from pocket.judge import Case, Score, capped_psnr_db, cases, pair_cases, score, views
from qie.compiler.checkpoint.checkpoint import POCKET
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.terminal import table

Rgb = NDArray[np.uint8]

SEED = 7
"""Seed of the noise of every edit."""

STEPS = (4, 8, 20, 40)
"""Numbers of steps to compare."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--bundle", default="pocket", help="name or folder of a bundle of the pocket model")
    parser.add_argument("--checkpoint", type=Path, default=POCKET, help="checkpoint of the bundle, for diffusers")
    parser.add_argument("--steps", type=int, help="steps of an edit, default: the bundle's")
    parser.add_argument("--phrases", type=int, help="phrases of every edit, default: all")
    parser.add_argument("--no-diffusers", action="store_true", help="leave out the comparison with diffusers")
    parser.add_argument("--plot", type=Path, help="SVG file for the PSNR over the number of steps")
    options = parser.parse_args()
    started = time.perf_counter()
    editor = Editor(open_bundle(options.bundle), encoder_cache=EncoderCache(bytes_max=0))
    steps = options.steps or editor.bundle.manifest.defaults.steps
    figures: dict[str, Any] = {"bundle": editor.bundle.path.name, "steps": steps}

    photos = {name: center_crop(name) for name in HELD_OUT}
    round_trips = {name: capped_psnr_db(round_trip(editor, photo), photo) for name, photo in photos.items()}
    print("\nRound trip of held-out photos through the VAE, dB")
    rows = [[name, f"{db:.2f}"] for name, db in round_trips.items()]
    print(table([*rows, ["mean", f"{fmean(round_trips.values()):.2f}"]], right=(1,)))
    figures["vae_round_trip_db"] = round_trips

    single = list(cases(phrases=options.phrases))
    scores = score(partial(edit, editor, steps), single)
    vae_psnr_db = round_trip_psnr_db(editor, single)
    print(f"\nEdits, {steps} steps, {len(single)} cases")
    print_scores(scores, vae_psnr_db)
    figures["instructions"] = [{**asdict(s), "vae_psnr_db": vae_psnr_db[s.name]} for s in scores]
    figures["nearest"] = fmean(s.nearest for s in scores)

    pairs = list(pair_cases())
    scores = score(partial(edit, editor, steps), pairs)
    print(f"\nPairs that training never combined, {steps} steps, {len(pairs)} cases")
    print_scores(scores, round_trip_psnr_db(editor, pairs))
    figures["pairs"] = [asdict(s) for s in scores]
    figures["pairs_nearest"] = fmean(s.nearest for s in scores)

    plain = list(cases(phrases=1))
    curve = {count: fmean(s.psnr_db for s in score(partial(edit, editor, count), plain)) for count in STEPS}
    print("\nNumber of steps, mean PSNR of the edits in dB")
    print(table([[str(count), f"{db:.2f}"] for count, db in curve.items()], right=(0, 1)))
    figures["curve"] = curve
    if options.plot is not None:
        line_plot(options.plot, curve, x_label="steps", y_label="mean PSNR, dB")

    if not options.no_diffusers:
        figures["diffusers"] = compare_with_diffusers(options.checkpoint, editor, steps, plain)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    write_report(options, figures)


def edit(editor: Editor, steps: int, images: Sequence[Rgb], text: str) -> Rgb:
    """The result of one edit, uint8 [H, W, 3]."""
    inputs = [Image.fromarray(image) for image in images]
    return np.asarray(editor.edit(Request(images=inputs, instructions=[text], seeds=[SEED], steps=steps)).images[0])


def round_trip(editor: Editor, image: Rgb) -> Rgb:
    """An image after the VAE's encoder and decoder."""
    return editor.stages.decode(editor.stages.encode([image]))[0]


def round_trip_psnr_db(editor: Editor, evaluated: Sequence[Case]) -> dict[str, float]:
    """Name -> mean PSNR of the exact results after a round trip."""
    values: dict[str, list[float]] = {}
    for case in evaluated:
        values.setdefault(case.name, []).append(capped_psnr_db(round_trip(editor, case.target), case.target))
    return {name: fmean(of_name) for name, of_name in values.items()}


def print_scores(scores: Sequence[Score], vae_psnr_db: dict[str, float]) -> None:
    rows = [
        [
            s.name,
            *(f"{db:.2f}" for db in (s.psnr_db, s.unedited_psnr_db, vae_psnr_db[s.name])),
            f"{s.ssim:.3f}",
            f"{s.unedited_ssim:.3f}",
            f"{s.nearest:.1%}",
        ]
        for s in scores
    ]
    means = [fmean(getattr(s, field) for s in scores) for field in ("psnr_db", "unedited_psnr_db")]
    mean = [
        "mean",
        *(f"{db:.2f}" for db in (*means, fmean(vae_psnr_db[s.name] for s in scores))),
        f"{fmean(s.ssim for s in scores):.3f}",
        f"{fmean(s.unedited_ssim for s in scores):.3f}",
        f"{fmean(s.nearest for s in scores):.1%}",
    ]
    header = ("edit", "PSNR", "unedited", "VAE", "SSIM", "unedited", "nearest")
    print(table([*rows, mean], header=header, right=range(1, 7)))


def compare_with_diffusers(checkpoint: Path, editor: Editor, steps: int, evaluated: Sequence[Case]) -> dict[str, float]:
    """The edits of one photo by qie and by diffusers, from the same noise."""
    from qie.compiler.validation.reference import load_reference

    reference = load_reference(checkpoint)
    photo = views()[0].image
    of_photo = [case for case in evaluated if np.array_equal(case.images[0], photo)]

    def edit_with_diffusers(images: Sequence[Rgb], text: str) -> Rgb:
        return reference.edit([Image.fromarray(image) for image in images], text, steps=steps, seed=SEED, cfg=1.0)

    figures = {
        "qie_psnr_db": fmean(s.psnr_db for s in score(partial(edit, editor, steps), of_photo)),
        "diffusers_psnr_db": fmean(s.psnr_db for s in score(edit_with_diffusers, of_photo)),
    }
    print(f"\n{len(of_photo)} edits of one photo, mean PSNR in dB")
    print(table([[name.removesuffix("_psnr_db"), f"{db:.3f}"] for name, db in figures.items()], right=(1,)))
    return figures


if __name__ == "__main__":
    main()
