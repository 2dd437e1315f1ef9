"""Golden cases made from the run of a bundle itself: what the engines computed stands for the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qie.compiler.validation.golden.compress import packed
from qie.compiler.validation.golden.file import CaseRecord, GoldenCase, GoldenRecord, case_tensor, png, write_golden
from qie.engines.bundle.bundle import Bundle
from qie.engines.editing.conditioning import condition
from qie.engines.editing.denoise import Denoiser, upload_schedule
from qie.engines.editing.edit import row_of, start_noise, table_dtype
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import encode
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.vision import vision_inputs
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image

__all__ = ["own_case", "write_own_golden"]


def own_case(
    bundle: Bundle, *, recorded: Sequence[int] = (0, 1, 2, 3), steps: int = 4, guidance: float = 4.0
) -> GoldenCase:
    """An edit of ``bundle`` as the case of a golden file; patches are in the order of the bundle's windows."""
    images = [smooth_image(150, 90, seed=1)]
    request = Request(images=images, instructions=["make it red"], seeds=[3], steps=steps, guidance=guidance)
    tensors: dict[str, Any] = {}
    with uncached_editor(bundle) as editor:
        settings = resolve(request, bundle.manifest)
        conditioning = condition(editor.stages, editor.tokenizer, request, settings)
        noise = start_noise(request, settings, bundle.manifest)
        schedule = sigmas(editor.model.scheduler, steps=steps, noise_tokens=noise.shape[1])
        tables = modulation_tables(bundle, schedule, dtype=table_dtype(editor.stages.engines["transformer"]))
        with editor.stages.session("transformer") as session:
            denoiser = Denoiser.start(
                session,
                [row_of(conditioning, settings, noise, 0)],
                schedule=upload_schedule(session, schedule, tables),
                rotary=editor.model.rotary,
                grids=conditioning.grids,
            )
            rows: dict[str, list[Any]] = {"latents": [], "velocity": [], "negative_velocity": [], "latents_next": []}
            for step in range(steps):
                before = denoiser.latents()
                denoiser.step()
                if step in recorded:
                    rows["latents"].append(before[0])
                    rows["velocity"].append(denoiser.velocity()[0])
                    rows["latents_next"].append(denoiser.latents()[0])
                    if (negative := denoiser.negative_velocity()) is not None:
                        rows["negative_velocity"].append(negative[0])
        tensors |= {name: np.stack(values) for name, values in rows.items() if values}
        tensors["final_latents"] = denoiser.latents()[0]
        size = settings.size
        (decoded,) = editor.stages.decode([denoiser.latents()[0].reshape(size.height // 16, size.width // 16, -1)])
        copies = prepare(images[0], bundle.manifest.model.areas, size=settings.reference)
        vision = vision_inputs([copies.vision], bundle.manifest.model.vision)
        prompt = encode(editor.tokenizer, ["make it red"], grids=vision.grids, spec=bundle.manifest.model.prompt)
        tensors["image_embeds"] = editor.stages.vision(vision)
    tensors |= {
        "input.0": png(images[0]),
        "reference_image.0": png(copies.vae),
        "patches": packed(vision.patches),
        "grid_thw": np.array(vision.grids, np.int64),
        "input_ids": prompt.input_ids[0],
        "position_ids": prompt.position_ids[:, 0],
        "reference_latents.0": conditioning.reference[0],
        "prompt_embeds": conditioning.prompts[0][0],
        "noise": noise[0],
        "noise_bfloat16": noise[0],
        "sigmas": schedule,
        "edit": png(Image.fromarray(decoded)),
    }
    if conditioning.negative is not None:
        tensors["negative_embeds"] = conditioning.negative[0]
    record = CaseRecord(
        name="red",
        instruction="make it red",
        negative=" ",
        seed=3,
        steps=steps,
        guidance=guidance,
        width=size.width,
        height=size.height,
        images=1,
        recorded=tuple(recorded),
    )
    return GoldenCase(record=record, tensors=tensors)


def write_own_golden(bundle: Bundle, path: Path, **options: Any) -> Path:
    """Write ``own_case`` as the golden file ``path``."""
    case, model = own_case(bundle, **options), bundle.manifest.model
    record = GoldenRecord(
        schema=1,
        qie="0",
        model=model.name,
        digest=model.digest,
        loras=(),
        dtype="float32",
        packages=(),
        tensors="",
        cases=(case.record,),
        modules=(),
    )
    write_golden(record, {case_tensor(0, name): array for name, array in case.tensors.items()}, path)
    return path
