"""What quantization costs the pocket model: ``python bench/quantization.py --images FOLDER [--json FILE]``.

Every scheme of the transformer with and without what makes it good, in one run: the velocity at every step where the
float32 model's own latents are fed (teacher-forced), the edits against the exact answers, and a step's time on this
processor. The graphs are those of the engines, in a float32 carrier, executed by onnxruntime.

Then every scheme of the language model: its prompt embeddings, and the edits. And what calibration on a picture's own
latents misses of true trajectories.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.pocket_quality import SEED, edit
from pocket.judge import Case, cases, score
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.packing.pack import build_bundle
from qie.compiler.planning.plan import make_plan
from qie.compiler.quantization.calibrate import calibrate
from qie.compiler.quantization.calibration import Calibration, read_calibration, write_calibration
from qie.compiler.quantization.observe import Observer
from qie.compiler.quantization.samples import INSTRUCTIONS, draw_samples, read_images
from qie.compiler.quantization.schemes import SCHEMES, Scheme
from qie.compiler.quantization.sensitivity import errors_of
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Attention, ComponentRecipe, SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component
from qie.engines.editing.conditioning import Conditioning, condition
from qie.engines.editing.denoise import Denoiser, StepState, upload_schedule
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request, resolve
from qie.engines.inputs.feeds import Feed, transformer_feed
from qie.engines.inputs.modulation import Tables, modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.terminal import table

FORCED = 6
"""Edits whose steps are compared."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of quantizing ``component``: ``replacement`` takes the place of the scheme of that name.

    ``excludes`` says whether the linears that the calibration excludes stay in float32.
    """

    name: str
    component: Component = "transformer"
    scheme: SchemeName = "none"
    replacement: Scheme | None = None
    excludes: bool = True
    attention: Attention = "none"


NAIVE = Scheme(weights=Quantizer(dtype="int8"), inputs=Quantizer(dtype="int8"))
ROUGH = replace(SCHEMES["int8-smooth"], smoothed=())

VARIANTS = (
    Variant(name="none"),
    Variant(name="fp8", scheme="fp8"),
    Variant(name="fp8, nothing excluded", scheme="fp8", excludes=False),
    Variant(name="fp8, and FP8 attention", scheme="fp8", attention="fp8"),
    Variant(name="int8-smooth", scheme="int8-smooth"),
    Variant(name="int8-smooth, nothing excluded", scheme="int8-smooth", excludes=False),
    Variant(name="int8 without smoothing", scheme="int8-smooth", replacement=ROUGH),
    Variant(name="int8 without smoothing, nothing excluded", scheme="int8-smooth", replacement=ROUGH, excludes=False),
    Variant(name="int8, naive min-max", scheme="int8-smooth", replacement=NAIVE, excludes=False),
    Variant(name="w8a16", scheme="w8a16"),
)

LANGUAGE = (
    *(Variant(name=name, component="language", scheme=name) for name in SCHEMES),
    *(
        Variant(
            name=f"{name} without smoothing",
            component="language",
            scheme=name,
            replacement=replace(SCHEMES[name], smoothed=()),
        )
        for name, scheme in SCHEMES.items()
        if scheme.smoothed
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=POCKET)
    parser.add_argument("--calibration", type=Path, help="default the checkpoint's own")
    parser.add_argument("--images", type=Path, help="pictures for the comparison of calibrations; none, no comparison")
    parser.add_argument("--phrases", type=int, default=1, help="phrasings of every instruction")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    known = read_calibration(options.calibration or options.checkpoint / "calibration.npz")
    asked = list(cases(phrases=options.phrases))
    forced = asked[:: len(asked) // FORCED][:FORCED]
    found: dict[str, Any] = {"edits": len(asked), "variants": {}, "language": {}}
    with tempfile.TemporaryDirectory() as folder:
        exact = Editor(build(options.checkpoint, VARIANTS[0], known, Path(folder) / "exact"))
        recorded = [record(exact, case) for case in forced]
        for variant in VARIANTS:
            with variant_editor(options.checkpoint, variant, known, Path(folder)) as editor:
                errors, seconds = teacher_forced(editor, recorded)
                found["variants"][variant.name] = {
                    "velocity_relative_l2": errors,
                    "step_seconds": seconds,
                    **edits_of(editor, variant, asked),
                }
        show(found["variants"])
        prompts = [prompt_embeds(exact, case) for case in forced]
        found["language"]["none"] = {"prompt_embeds_relative_l2": 0.0, **edits_of(exact, LANGUAGE[0], asked)}
        for variant in LANGUAGE:
            with variant_editor(options.checkpoint, variant, known, Path(folder)) as editor:
                found["language"][variant.name] = {
                    "prompt_embeds_relative_l2": errors_of([prompt_embeds(editor, case) for case in forced], prompts),
                    **edits_of(editor, variant, asked),
                }
        show_language(found["language"])
        if options.images is not None:
            found["trajectories"] = trajectories(options, exact, Path(folder))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


@contextmanager
def variant_editor(checkpoint: Path, variant: Variant, known: Calibration, folder: Path) -> Iterator[Editor]:
    """An editor of the pocket model that is quantized so."""
    with (
        replaced(variant),
        tempfile.TemporaryDirectory(dir=folder) as own,
        Editor(build(checkpoint, variant, known, Path(own) / "bundle")) as editor,
    ):
        yield editor


def edits_of(editor: Editor, variant: Variant, asked: Sequence[Case]) -> dict[str, Any]:
    """How good the edits are, and what the weights of the variant's component take."""
    manifest = editor.bundle.manifest
    scores = score(partial(edit, editor, manifest.defaults.steps), asked)
    (engine,) = (e for e in manifest.engines if e.component == variant.component)
    return {
        "psnr_db": fmean(s.psnr_db for s in scores),
        "nearest": fmean(s.nearest for s in scores),
        "quantized": 0 if engine.quantization is None else engine.quantization.quantized,
        "weight_bytes": engine.files[1].bytes,
    }


def prompt_embeds(editor: Editor, case: Case) -> np.ndarray:
    """The prompt embeddings of an edit, [1, L, D]."""
    return conditioning_of(editor, case).prompts[0]


@contextmanager
def replaced(variant: Variant) -> Iterator[None]:
    """The table of schemes with the variant's own."""
    before = dict(SCHEMES)
    if variant.replacement is not None:
        SCHEMES[variant.scheme] = variant.replacement
    try:
        yield
    finally:
        SCHEMES.update(before)


def build(checkpoint: Path, variant: Variant, known: Calibration, destination: Path) -> Bundle:
    """The variant for the processor, with a float32 carrier."""
    recipe = load_recipe("cpu")
    section = ComponentRecipe(precision="float32", scheme=variant.scheme, attention=variant.attention)
    plan = make_plan(
        open_checkpoint(str(checkpoint)),
        recipe_name="cpu",
        recipe=replace(recipe, components=replace(recipe.components, **{variant.component: section})),
        loras=[],
        destination=destination,
        calibration=known if variant.excludes else replace(known, exclude={}),
    )
    return build_bundle(plan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """An edit: what the transformer reads at every step, and every step."""

    conditioning: Conditioning
    steps: tuple[StepState, ...]


def record(editor: Editor, case: Case) -> Recording:
    """Run the edit of ``case`` and record it."""
    steps: list[StepState] = []
    editor.edit(request_of(case), observer=steps.append)
    return Recording(conditioning=conditioning_of(editor, case), steps=tuple(steps))


def request_of(case: Case) -> Request:
    return Request(images=[Image.fromarray(image) for image in case.images], instructions=[case.text], seeds=[SEED])


def conditioning_of(editor: Editor, case: Case) -> Conditioning:
    request = request_of(case)
    return condition(editor.stages, editor.tokenizer, request, resolve(request, editor.bundle.manifest))


def schedule_of(editor: Editor, recording: Recording) -> tuple[np.ndarray, Tables]:
    """Sigmas and modulation of the recorded steps, by the model of ``editor``."""
    tokens = recording.steps[0].latents.shape[1]
    schedule = sigmas(editor.model.scheduler, steps=len(recording.steps), noise_tokens=tokens)
    return schedule, modulation_tables(editor.bundle.path, editor.model.modulation, schedule)


def teacher_forced(editor: Editor, recorded: Sequence[Recording]) -> tuple[list[float], float]:
    """Relative L2 of the velocity at every step over all edits, and the median seconds of a step."""
    velocities: list[list[np.ndarray]] = [[] for _ in recorded[0].steps]
    exact: list[list[np.ndarray]] = [[] for _ in recorded[0].steps]
    times = []
    with editor.stages.session("transformer") as session:
        for recording in recorded:
            schedule, tables = schedule_of(editor, recording)
            denoiser = Denoiser.start(
                session,
                schedule=upload_schedule(session, schedule, tables),
                noise_BNC=recording.steps[0].latents,
                reference_1RC=recording.conditioning.reference,
                prompt_BLD=recording.conditioning.prompts[0],
                rotary=editor.model.rotary,
                grids=recording.conditioning.grids,
            )
            for number, state in enumerate(recording.steps):
                denoiser.set_latents(state.latents)
                start = time.perf_counter()
                denoiser.step()
                times.append(time.perf_counter() - start)
                velocities[number].append(denoiser.velocity())
                exact[number].append(state.velocity)
    return [errors_of(v, e) for v, e in zip(velocities, exact, strict=True)], statistics.median(times)


def feeds(editor: Editor, recording: Recording) -> list[Feed]:
    """The transformer's inputs at every recorded step."""
    schedule, tables = schedule_of(editor, recording)
    return [
        transformer_feed(
            latents_BNC=state.latents,
            reference_BRC=recording.conditioning.reference,
            prompt_BLD=recording.conditioning.prompts[0],
            rotary=editor.model.rotary,
            grids=recording.conditioning.grids,
            modulation_YM=tables.blocks[state.step],
            modulation_out_O=tables.out[state.step],
            dsigma=schedule[state.step + 1] - schedule[state.step],
        )
        for state in recording.steps
    ]


JUDGED = ("PSNR", "", "nearest")


def judged(variant: Mapping[str, Any], plain: Mapping[str, Any]) -> list[str]:
    """How good the edits are, in the columns JUDGED."""
    change = variant["psnr_db"] - plain["psnr_db"]
    return [f"{variant['psnr_db']:.2f}", f"{change:+.2f}", f"{variant['nearest']:.1%}"]


def show(variants: Mapping[str, Mapping[str, Any]]) -> None:
    plain = variants["none"]
    rows = [
        [
            name,
            str(v["quantized"]),
            *(f"{100 * error:.2f} %" for error in v["velocity_relative_l2"]),
            *judged(v, plain),
            f"{v['weight_bytes'] / 1e6:.1f} MB",
            f"{1000 * v['step_seconds']:.1f} ms",
        ]
        for name, v in variants.items()
    ]
    steps = [f"step {number}" for number in range(1, len(plain["velocity_relative_l2"]) + 1)]
    header = ("transformer", "linears", *steps, *JUDGED, "weights", "a step here")
    print(table(rows, header=header, right=range(1, len(header))))


def show_language(variants: Mapping[str, Mapping[str, Any]]) -> None:
    plain = variants["none"]
    rows = [
        [
            name,
            str(v["quantized"]),
            f"{100 * v['prompt_embeds_relative_l2']:.2f} %",
            *judged(v, plain),
            f"{v['weight_bytes'] / 1e6:.2f} MB",
        ]
        for name, v in variants.items()
    ]
    header = ("language model", "linears", "prompt embeddings", *JUDGED, "weights")
    print()
    print(table(rows, header=header, right=range(1, len(header))))


def trajectories(options: argparse.Namespace, exact: Editor, folder: Path) -> dict[str, float]:
    """Statistics from pictures' own latents against those from true edits of the same pictures."""
    checkpoint = open_checkpoint(str(options.checkpoint))
    readers: Any = {part: checkpoint.reader(part) for part in ("transformer", "text_encoder", "vae")}
    samples = draw_samples(read_images(options.images), INSTRUCTIONS, 32)
    own = calibrate(checkpoint, readers, samples, model=checkpoint.digest())
    graph = GRAPHS["transformer"](checkpoint, "float32")
    steps: list[Feed] = []
    for sample in samples[:: len(samples) // 8]:
        case = Case(
            name="",
            images=(np.asarray(sample.image),),
            text=sample.text.strip() or "blur it",
            target=np.empty(0),
            other_targets=(),
        )
        steps += feeds(exact, record(exact, case))
    observer = Observer(graph, readers, len(steps))
    observer.run(steps, lambda what, done, total: None)
    ratios = np.array([own.amax[name].max() / values.max() for name, values in observer.amax.items()])
    channels = np.concatenate([own.amax[name] / np.maximum(values, 1e-6) for name, values in observer.amax.items()])
    both = {
        "samples": len(samples),
        "steps": len(steps),
        "range_ratio_median": float(np.median(ratios)),
        "range_ratio_least": float(ratios.min()),
        "range_ratio_most": float(ratios.max()),
        "channel_ratio_median": float(np.median(channels)),
    }
    truth = replace(
        own,
        amax=own.amax | observer.amax,
        smoothing_scales={s: f | observer.smoothing_scales.get(s, {}) for s, f in own.smoothing_scales.items()},
    )
    few = list(cases(phrases=1))
    for name, one in (("own latents", own), ("trajectories", truth)):
        write_calibration(one, folder / f"{name}.npz")
        again = read_calibration(folder / f"{name}.npz")
        editor = Editor(build(options.checkpoint, Variant(name=name, scheme="int8-smooth"), again, folder / name))
        scores = score(partial(edit, editor, editor.bundle.manifest.defaults.steps), few)
        both[f"psnr_db, {name}"] = fmean(s.psnr_db for s in scores)
    print("\nCalibration on a picture's own latents against true trajectories")
    print(table([[name, f"{value:.3f}"] for name, value in both.items()], right=(1,)))
    return both


if __name__ == "__main__":
    main()
