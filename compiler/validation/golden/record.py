"""Recording a golden file: every case edited once by the torch pipeline, and what its stages computed on the way.

Shape suffixes: K recorded steps, N noise tokens, C latent channels of a token, B batch, L prompt tokens, D width of the
prompt embeddings, R tokens of a reference image.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import qie
from qie.compiler.checkpoint.checkpoint import digest_cache, open_checkpoint
from qie.compiler.checkpoint.distilled import distilled_model, find_schedule
from qie.compiler.checkpoint.lora import fused_reader, open_lora, parse_lora
from qie.compiler.checkpoint.model import Model
from qie.compiler.metrics.error import relative_l2
from qie.compiler.validation.golden.cases import Case, find_cases
from qie.compiler.validation.golden.compress import packed
from qie.compiler.validation.golden.file import (
    CaseRecord,
    Golden,
    GoldenCase,
    GoldenRecord,
    case_tensor,
    is_golden,
    module_tensor,
    open_golden,
    png,
    write_golden,
)
from qie.compiler.validation.golden.modules import ModuleSamples, sampled
from qie.compiler.validation.packages import reference_packages
from qie.compiler.validation.reference import Reference, ReferenceStep, load_reference
from qie.engines.bundle.manifest import LoraRecord
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.errors import GoldenError
from qie.engines.files import is_writable
from qie.engines.progress import Progress, no_progress

__all__ = ["record_golden"]

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]

CONSISTENT = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest relative L2 difference between a pass of the edit and the same pass composed of the recorded tensors."""


def record_golden(
    model: str | Path,
    out: Path,
    *,
    cases: Path | None = None,
    loras: Sequence[str | tuple[str | Path, float]] = (),
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    progress: Progress = no_progress,
) -> Golden:
    """Record a golden file with the torch pipeline on the CPU.

    Args:
        model: folder in diffusers format, hub id, or ``"pocket"``.
        out: file to write; an earlier golden file is replaced.
        cases: TOML file of cases; None for the checkpoint's own, else those that qie ships.
        loras: fused into the transformer; ``"PATH"``, ``"PATH:WEIGHT"`` or (path, weight).
        revision: branch, tag or commit of a hub id.
        dtype: of weights and activations.
        progress: called with (stage, units done, units in all); a unit of a case is a step.

    Raises:
        BackendMissingError: ``qie[reference]`` is not installed.
        CheckpointError, ExportError: the checkpoint or a LoRA is missing, incomplete or malformed.
        GoldenError: the cases cannot be read, the model does not take them, or nothing can be written to ``out``.
        OSError: the disk is full.
    """
    packages = reference_packages()
    _check_output(out)
    opened = [open_lora(Path(path), weight) for path, weight in map(_weighted, loras)]
    checkpoint = open_checkpoint(str(model), revision=revision, weights=False)
    schedule = find_schedule(None, opened)
    found = find_cases(cases, checkpoint.path, distilled_model(checkpoint.model, schedule))
    checkpoint = checkpoint.with_weights(progress=lambda done, total: progress("download", done, total))
    fused_reader(checkpoint.reader("transformer"), opened)  # refuses LoRAs of another model
    digest = checkpoint.digest(
        cache=digest_cache(), progress=lambda done, total: progress("checkpoint digest", done, total)
    )
    reference = load_reference(checkpoint.path, dtype=dtype, loras=opened)

    tensors: Arrays = {}
    recorded = []
    for number, case in enumerate(found):
        recorded.append(_record_case(reference, case, progress))
        tensors |= {case_tensor(number, name): array for name, array in recorded[-1].tensors.items()}
    modules = list(_sample(reference, checkpoint.model, recorded[0], progress))
    for samples in modules:
        tensors |= {module_tensor(samples.component, name): values for name, values in samples.samples.items()}
    record = GoldenRecord(
        schema=1,
        qie=qie.__version__,
        model=checkpoint.name,
        digest=digest,
        loras=tuple(LoraRecord(name=lora.name, sha256=lora.digest(), weight=lora.weight) for lora in opened),
        dtype=dtype,
        packages=packages,
        tensors="",
        cases=tuple(case.record for case in recorded),
        modules=tuple(samples.record() for samples in modules),
    )
    write_golden(record, tensors, out)
    return open_golden(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Passes:
    """What the transformer reads at every step of a case, as the recorded tensors have it."""

    reference: Reference
    case: GoldenCase

    def velocity(self, step: int, embeds_LD: Floats) -> Floats:
        """The velocity [N, C] of a pass at the recorded step number ``step``."""
        case, record = self.case, self.case.record
        grids = [(record.height, record.width), *(image.shape[:2] for image in case.reference_images)]
        return self.reference.velocity(
            case.latents[step][None],
            [latents_RC[None] for latents_RC in case.reference_latents],
            embeds_LD[None],
            float(case.sigmas[record.recorded[step]]),
            [(height // SIDE_MULTIPLE, width // SIDE_MULTIPLE) for height, width in grids],
        )[0]


def _record_case(reference: Reference, case: Case, progress: Progress) -> GoldenCase:
    """Edit once, and record what goes into the edit and comes out of each stage."""
    prompt = reference.prompt(case.images, case.instruction)
    resized = [reference.reference_image(image) for image in case.images]
    noise_NC = reference.noise(case.seed, case.width, case.height)
    tensors: Arrays = {
        "patches": packed(prompt.patches),
        "grid_thw": prompt.grid_thw,
        "image_embeds": reference.vision(prompt.patches, prompt.grid_thw),
        "input_ids": prompt.input_ids,
        "position_ids": prompt.position_ids,
        "prompt_embeds": prompt.embeds,
        "noise": noise_NC,
        "noise_bfloat16": reference.noise(case.seed, case.width, case.height, "bfloat16"),
    }
    if case.guidance > 1:
        tensors["negative_embeds"] = reference.prompt_embeds(case.images, case.negative)
    for number, (image, smaller) in enumerate(zip(case.images, resized, strict=True)):
        tensors[f"input.{number}"] = png(image)
        tensors[f"reference_image.{number}"] = png(smaller)
        tensors[f"reference_latents.{number}"] = reference.encode_image(smaller)

    taken, total = list[ReferenceStep](), case.steps * max(1, case.chain)
    done = 0

    def edit(images: Sequence[Image.Image], keep: list[ReferenceStep]) -> NDArray[np.uint8]:
        def on_step(step: ReferenceStep) -> None:
            nonlocal done
            done += 1
            progress(case.name, done, total)
            if step.index in (0, case.steps - 1, *case.recorded):
                keep.append(step)

        return reference.edit(
            images,
            case.instruction,
            negative=case.negative,
            cfg=case.guidance,
            steps=case.steps,
            latents=noise_NC,
            width=case.width,
            height=case.height,
            on_step=on_step,
        )

    progress(case.name, 0, total)
    result_HWC = edit(case.images, taken)
    tensors |= {"sigmas": reference.sigmas, "final_latents": taken[-1].latents_next, "edit": png(result_HWC)}
    steps = [step for step in taken if step.index in case.recorded]
    for name, values in (
        ("latents", [step.latents for step in steps]),
        ("latents_next", [step.latents_next for step in steps]),
        ("velocity", [step.conditional for step in steps]),
        ("negative_velocity", [step.negative for step in steps if step.negative is not None]),
    ):
        if values:
            tensors[name] = np.stack(values)
    if case.target is not None:
        tensors["target"] = png(case.target)
    for number in range(case.chain):
        tensors[f"chain.{number}"] = png(result_HWC)
        if number + 1 < case.chain:
            result_HWC = edit([Image.fromarray(result_HWC)], [])
    record = CaseRecord(
        name=case.name,
        instruction=case.instruction,
        negative=case.negative,
        seed=case.seed,
        steps=case.steps,
        guidance=case.guidance,
        width=case.width,
        height=case.height,
        images=len(case.images),
        recorded=case.recorded,
        chain=case.chain,
        target=case.target is not None,
    )
    recorded = GoldenCase(record=record, tensors=tensors)
    _check_consistent(reference, recorded, taken)
    return recorded


def _check_consistent(reference: Reference, case: GoldenCase, taken: Sequence[ReferenceStep]) -> None:
    """That the pipeline's edit is made of what was recorded; anything else is an error of qie."""
    record, bound = case.record, CONSISTENT[reference.dtype]
    first, passes = taken[0], _Passes(reference=reference, case=case)
    assert relative_l2(first.latents, case.noise) < (1e-6 if reference.dtype == "float32" else 0.01), record.name
    assert relative_l2(passes.velocity(0, case.prompt_embeds), case.velocity[0]) < bound, record.name
    if case.negative_embeds is not None and case.negative_velocity is not None:
        assert relative_l2(passes.velocity(0, case.negative_embeds), case.negative_velocity[0]) < bound, record.name
    rows, columns = record.height // SIDE_MULTIPLE, record.width // SIDE_MULTIPLE
    decoded = reference.decode(case.final_latents, rows, columns).astype(np.int16)
    assert np.abs(decoded - np.asarray(case.edit)).max() <= 1, record.name


def _sample(reference: Reference, model: Model, case: GoldenCase, progress: Progress) -> Iterator[ModuleSamples]:
    """The samples of every component during one run of ``case``."""
    record, middle = case.record, len(case.record.recorded) // 2
    rows, columns = record.height // SIDE_MULTIPLE, record.width // SIDE_MULTIPLE
    passes = _Passes(reference=reference, case=case)
    runs: Mapping[Any, Any] = {
        "vision": lambda: reference.vision(case.patches, case.grid_thw),
        "language": lambda: reference.prompt(case.images, record.instruction),
        "vae_encoder": lambda: reference.encode_image(case.reference_images[0]),
        "transformer": lambda: passes.velocity(middle, case.prompt_embeds),
        "vae_decoder": lambda: reference.decode(case.final_latents, rows, columns),
    }
    for number, (component, run) in enumerate(runs.items()):
        progress("modules", number, len(runs))
        with sampled(reference, model, component) as samples:
            run()
        yield replace(samples, step=record.recorded[middle] if component == "transformer" else 0)
    progress("modules", len(runs), len(runs))


def _weighted(lora: str | tuple[str | Path, float]) -> tuple[str | Path, float]:
    return lora if isinstance(lora, tuple) else parse_lora(lora)


def _check_output(out: Path) -> None:
    """Check that the file can be written, before work is spent on it, and that no other file is replaced."""
    if not is_writable(out):
        raise GoldenError(f"{out} cannot be written; choose a file in an existing folder", option="out")
    if out.exists() and not is_golden(out):
        raise GoldenError(f"{out} is not a golden file and would be lost; choose another file", option="out")
