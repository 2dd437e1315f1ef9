"""Accuracy and speed of quantized pocket models: ``python -m bench.quantization [--images FOLDER]``.

Every scheme of the transformer, with and without exclusions and smoothing, in one run: the relative L2 error of the
velocity at every step, teacher-forced with the latents of the float32 model; the edits against the exact results; and
the time of a step on this CPU. The graphs are those of the engines with float32 in place of bfloat16, executed by
onnxruntime.

Then every scheme of the language model: its prompt embeddings, and the edits. With FOLDER, also how the statistics of
calibration on noised latents of images differ from those of true denoising trajectories.
"""

import argparse
import statistics
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

from bench.pocket_quality import SEED, edit
from bench.report import argument_parser, write_report
from pocket.judge import Case, cases, score
from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.metrics.error import pooled_relative_l2
from qie.compiler.packing import build as packing
from qie.compiler.planning.plan import make_plan
from qie.compiler.quantization.calibration import Calibration, read_calibration, write_calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.samples import draw_samples, read_images
from qie.compiler.quantization.schemes import SCHEMES, Scheme
from qie.compiler.quantization.statistics import LinearStatistics
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Attention, ComponentRecipe, SchemeName
from qie.compiler.weights.quantizer import Quantizer
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component
from qie.engines.editing.conditioning import Conditioning, condition
from qie.engines.editing.denoise import Denoiser, Row, StepState, upload_schedule
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.feeds import Feed, transformer_feed
from qie.engines.inputs.modulation import Tables, modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.terminal import table

TEACHER_FORCED = 6
"""Number of edits whose steps are compared."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of quantizing one component.

    Attributes:
        name: name in the tables.
        component: the component.
        scheme: name of the scheme.
        replacement: replaces the scheme of that name.
        exclude: whether linears that the calibration excludes stay unquantized.
        attention: quantization of attention.
    """

    name: str
    component: Component = "transformer"
    scheme: SchemeName = "none"
    replacement: Scheme | None = None
    exclude: bool = True
    attention: Attention = "none"


INT8_MIN_MAX = Scheme(weights=Quantizer(dtype="int8"), inputs=Quantizer(dtype="int8"))
INT8_PLAIN = replace(SCHEMES["int8-smooth"], smoothed=())

VARIANTS = (
    Variant(name="none"),
    Variant(name="fp8", scheme="fp8"),
    Variant(name="fp8, nothing excluded", scheme="fp8", exclude=False),
    Variant(name="fp8, and FP8 attention", scheme="fp8", attention="fp8"),
    Variant(name="int8-smooth", scheme="int8-smooth"),
    Variant(name="int8-smooth, nothing excluded", scheme="int8-smooth", exclude=False),
    Variant(name="int8 without smoothing", scheme="int8-smooth", replacement=INT8_PLAIN),
    Variant(
        name="int8 without smoothing, nothing excluded", scheme="int8-smooth", replacement=INT8_PLAIN, exclude=False
    ),
    Variant(name="int8, naive min-max", scheme="int8-smooth", replacement=INT8_MIN_MAX, exclude=False),
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
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, default=POCKET, help="folder of the checkpoint, default: pocket")
    parser.add_argument("--calibration", type=Path, help="calibration file, default: the checkpoint's")
    parser.add_argument("--images", type=Path, help="folder of images for the comparison of calibrations")
    parser.add_argument("--phrases", type=int, default=1, help="phrases of every edit, default: 1")
    options = parser.parse_args()
    calibration = read_calibration(options.calibration or options.checkpoint / "calibration.npz")
    evaluated = list(cases(phrases=options.phrases))
    forced = evaluated[:: len(evaluated) // TEACHER_FORCED][:TEACHER_FORCED]
    transformers: dict[str, Any] = {}
    languages: dict[str, Any] = {}
    figures: dict[str, Any] = {"edits": len(evaluated), "variants": transformers, "language": languages}
    with tempfile.TemporaryDirectory() as folder:
        exact = uncached_editor(build(options.checkpoint, VARIANTS[0], calibration, Path(folder) / "exact"))
        recordings = [record(exact, case) for case in forced]
        for variant in VARIANTS:
            with variant_editor(options.checkpoint, variant, calibration, Path(folder)) as editor:
                errors, seconds = teacher_forced_errors(editor, recordings)
                transformers[variant.name] = {
                    "velocity_relative_l2": errors,
                    "step_seconds": seconds,
                    **evaluate(editor, variant, evaluated),
                }
        show_transformers(transformers)
        exact_embeds = [prompt_embeds(exact, case) for case in forced]
        languages["none"] = {"prompt_embeds_relative_l2": 0.0, **evaluate(exact, LANGUAGE[0], evaluated)}
        for variant in LANGUAGE:
            with variant_editor(options.checkpoint, variant, calibration, Path(folder)) as editor:
                embeds = [prompt_embeds(editor, case) for case in forced]
                languages[variant.name] = {
                    "prompt_embeds_relative_l2": pooled_relative_l2(embeds, exact_embeds),
                    **evaluate(editor, variant, evaluated),
                }
        show_languages(languages)
        if options.images is not None:
            figures["trajectories"] = compare_calibrations(options, exact, Path(folder))
    write_report(options, figures)


@contextmanager
def variant_editor(checkpoint: Path, variant: Variant, calibration: Calibration, folder: Path) -> Iterator[Editor]:
    """An editor of the variant, whose bundle is deleted afterwards."""
    with (
        replaced_scheme(variant),
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        uncached_editor(build(checkpoint, variant, calibration, Path(temporary) / "bundle")) as editor,
    ):
        yield editor


def evaluate(editor: Editor, variant: Variant, evaluated: Sequence[Case]) -> dict[str, Any]:
    """The scores of the edits, and the size of the weights of the variant's component."""
    manifest = editor.bundle.manifest
    scores = score(partial(edit, editor, manifest.defaults.steps), evaluated)
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


def uncached_editor(bundle: Bundle) -> Editor:
    """An editor whose every edit runs every engine."""
    return Editor(bundle, encoder_cache=EncoderCache(bytes_max=0))


@contextmanager
def replaced_scheme(variant: Variant) -> Iterator[None]:
    """Replace the scheme in the table of schemes by that of the variant, for the block."""
    schemes = dict(SCHEMES)
    if variant.replacement is not None:
        SCHEMES[variant.scheme] = variant.replacement
    try:
        yield
    finally:
        SCHEMES.update(schemes)


def build(checkpoint: Path, variant: Variant, calibration: Calibration, destination: Path) -> Bundle:
    """Build the variant for the CPU, with float32 in place of bfloat16."""
    recipe = load_recipe("cpu")
    section = ComponentRecipe(precision="float32", scheme=variant.scheme, attention=variant.attention)
    plan = make_plan(
        open_checkpoint(str(checkpoint)),
        recipe_name="cpu",
        recipe=replace(recipe, components=replace(recipe.components, **{variant.component: section})),
        loras=[],
        destination=destination,
        calibration=calibration if variant.exclude else replace(calibration, exclude={}),
    )
    return packing.build(plan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """The inputs of the transformer in one edit, and every step of it."""

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
    """The sigmas and the modulation of the recorded steps, from the model of ``editor``."""
    tokens = recording.steps[0].latents.shape[1]
    schedule = sigmas(editor.model.scheduler, steps=len(recording.steps), noise_tokens=tokens)
    return schedule, modulation_tables(editor.bundle, schedule)


def teacher_forced_errors(editor: Editor, recordings: Sequence[Recording]) -> tuple[list[float], float]:
    """The relative L2 error of the velocity at every step over all recordings, and the median seconds of a step."""
    velocities: list[list[np.ndarray]] = [[] for _ in recordings[0].steps]
    exact: list[list[np.ndarray]] = [[] for _ in recordings[0].steps]
    times = []
    with editor.stages.session("transformer") as session:
        for recording in recordings:
            schedule, tables = schedule_of(editor, recording)
            row = Row(
                latents=recording.steps[0].latents[0],
                reference=recording.conditioning.reference[0],
                prompt=recording.conditioning.prompts[0][0],
                negative=None,
                guidance=1.0,
            )
            denoiser = Denoiser.start(
                session,
                [row],
                schedule=upload_schedule(session, schedule, tables),
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
    return [pooled_relative_l2(v, e) for v, e in zip(velocities, exact, strict=True)], statistics.median(times)


def transformer_feeds(editor: Editor, recording: Recording) -> list[Feed]:
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


SCORE_COLUMNS = ("PSNR", "", "nearest")


def score_cells(variant: Mapping[str, Any], unquantized: Mapping[str, Any]) -> list[str]:
    """The scores of the edits, in SCORE_COLUMNS."""
    change = variant["psnr_db"] - unquantized["psnr_db"]
    return [f"{variant['psnr_db']:.2f}", f"{change:+.2f}", f"{variant['nearest']:.1%}"]


def show_transformers(variants: Mapping[str, Mapping[str, Any]]) -> None:
    unquantized = variants["none"]
    rows = [
        [
            name,
            str(v["quantized"]),
            *(f"{100 * error:.2f} %" for error in v["velocity_relative_l2"]),
            *score_cells(v, unquantized),
            f"{v['weight_bytes'] / 1e6:.1f} MB",
            f"{1000 * v['step_seconds']:.1f} ms",
        ]
        for name, v in variants.items()
    ]
    steps = [f"step {number}" for number in range(1, len(unquantized["velocity_relative_l2"]) + 1)]
    header = ("transformer", "linears", *steps, *SCORE_COLUMNS, "weights", "step")
    print(table(rows, header=header, right=range(1, len(header))))


def show_languages(variants: Mapping[str, Mapping[str, Any]]) -> None:
    unquantized = variants["none"]
    rows = [
        [
            name,
            str(v["quantized"]),
            f"{100 * v['prompt_embeds_relative_l2']:.2f} %",
            *score_cells(v, unquantized),
            f"{v['weight_bytes'] / 1e6:.2f} MB",
        ]
        for name, v in variants.items()
    ]
    header = ("language model", "linears", "prompt embeddings", *SCORE_COLUMNS, "weights")
    print()
    print(table(rows, header=header, right=range(1, len(header))))


def compare_calibrations(options: argparse.Namespace, exact: Editor, folder: Path) -> dict[str, float]:
    """Statistics over noised latents of images against those over denoising trajectories of the same images."""
    checkpoint = open_checkpoint(str(options.checkpoint))
    readers = checkpoint.readers()
    samples = draw_samples(read_images(options.images, 32), INSTRUCTIONS, 32)
    calibration = measure(checkpoint, readers, samples, model=checkpoint.digest())
    feeds: list[Feed] = []
    for sample in samples[:: len(samples) // 8]:
        case = Case(
            name="",
            images=(np.asarray(sample.image),),
            text=sample.text.strip() or "blur it",
            target=np.empty(0),
            other_targets=(),
        )
        feeds += transformer_feeds(exact, record(exact, case))
    statistics = LinearStatistics(GRAPHS["transformer"](checkpoint.model, "float32"), readers, len(feeds))
    statistics.run(feeds, lambda what, done, total: None)
    ratios = np.array([calibration.amax[name].max() / amax.max() for name, amax in statistics.found.amax.items()])
    channels = np.concatenate(
        [calibration.amax[name] / np.maximum(amax, 1e-6) for name, amax in statistics.found.amax.items()]
    )
    figures = {
        "samples": len(samples),
        "steps": len(feeds),
        "range_ratio_median": float(np.median(ratios)),
        "range_ratio_min": float(ratios.min()),
        "range_ratio_max": float(ratios.max()),
        "channel_ratio_median": float(np.median(channels)),
    }
    trajectory_calibration = replace(
        calibration,
        amax=calibration.amax | statistics.found.amax,
        smoothing_scales={
            scheme: scales | statistics.found.smoothing_scales.get(scheme, {})
            for scheme, scales in calibration.smoothing_scales.items()
        },
    )
    plain = list(cases(phrases=1))
    for name, of_name in (("noised latents", calibration), ("trajectories", trajectory_calibration)):
        write_calibration(of_name, folder / f"{name}.npz")
        stored = read_calibration(folder / f"{name}.npz")
        variant = Variant(name=name, scheme="int8-smooth")
        with uncached_editor(build(options.checkpoint, variant, stored, folder / name)) as editor:
            scores = score(partial(edit, editor, editor.bundle.manifest.defaults.steps), plain)
        figures[f"psnr_db, {name}"] = fmean(s.psnr_db for s in scores)
    print("\nCalibration on noised latents of images against denoising trajectories")
    print(table([[name, f"{value:.3f}"] for name, value in figures.items()], right=(1,)))
    return figures


if __name__ == "__main__":
    main()
