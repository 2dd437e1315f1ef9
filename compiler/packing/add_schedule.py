"""Adds the modulation tables of a schedule to a bundle."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qie.compiler.planning.resolve import LoraSource, compile_packages
from qie.engines.bundle.bundle import Bundle, check_file, open_bundle
from qie.engines.bundle.manifest import AddedSchedule, Manifest
from qie.engines.bundle.specs import Size
from qie.engines.errors import BuildError, BundleError, CheckpointError, RequestError
from qie.engines.progress import Progress, no_progress

if TYPE_CHECKING:
    from qie.compiler.checkpoint.safetensors import TensorReader

__all__ = ["add_schedule"]


def add_schedule(
    bundle: Bundle | str | Path | None = None,
    *,
    steps: int,
    sizes: Sequence[tuple[int, int]] | None = None,
    model: str | Path | None = None,
    revision: str | None = None,
    loras: Sequence[LoraSource] = (),
    progress: Progress = no_progress,
) -> Bundle:
    """Add the modulation tables of ``steps`` steps to a bundle, for edits with any guidance.

    They are computed from the modulation weights of the bundle or, where it has tables alone, from the checkpoint and
    the LoRAs that it was built from. The bundle is replaced when they are complete; until then it stays unchanged. All
    other files stay the same. A bundle that has the tables stays as it is.

    Args:
        bundle: an opened bundle, or a name or folder of one; None is the newest.
        steps: denoising steps.
        sizes: width and height of results in pixels; None for every size that the engines are tuned for.
        model: the checkpoint of a bundle without modulation weights: a folder, a hub id or ``"pocket"``; None for the
            one that the bundle names.
        revision: branch, tag or commit of a hub id; None for the bundle's.
        loras: those of the bundle, in their order, where it has tables alone.
        progress: called with (kind of work, bytes done, bytes in all).

    Raises:
        BackendMissingError: ``qie[compile]`` is not installed.
        BundleError: there is no such bundle, or it is damaged.
        RequestError: the bundle takes no such steps or sizes.
        CheckpointError: the checkpoint or a LoRA is missing, damaged or not the bundle's.
        BuildError: no checkpoint is known, or the disk is full.
    """
    with compile_packages():
        from qie.compiler.packing.take_over import take_over
        from qie.compiler.packing.writing import writing
        from qie.compiler.weights.modulation import write_modulation
        from qie.compiler.weights.stored_modulation import StoredModulation
    from qie.engines.bundle.sealed import write_manifest
    from qie.engines.inputs.schedule import sigmas
    from qie.engines.inputs.stored_schedules import has_tables, stored_dtype

    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    manifest, record = opened.manifest, opened.manifest.model.modulation
    wanted = _wanted(manifest, steps, sizes)
    if record.digest is None:
        raise BuildError(
            f"{opened.path} was built by an earlier version, which gave tables other names; build the bundle again"
        )
    lacking = tuple(size for size in wanted if not has_tables(manifest, steps, size))
    if not lacking:
        return opened
    schedules = [sigmas(manifest.model.scheduler, steps=steps, noise_tokens=size.tokens) for size in lacking]
    needed = len({values.tobytes() for values in schedules}) * steps * record.values * stored_dtype(record).itemsize
    free = shutil.disk_usage(opened.path).free
    if needed > free:
        raise BuildError(f"the tables for {opened.path} need {needed:,} bytes, and {free:,} are free; free some space")
    if record.file is None:
        reader = _reader(opened, model, revision, loras, progress)
    else:
        check_file(opened, record.file)
        reader = opened.folder.read(lambda folder: StoredModulation(folder, record))
    with writing(opened.path, needed) as folder:
        if not take_over(manifest.files(), opened, folder):
            raise BundleError(f"{opened.path} is damaged; build the bundle again with `qie build`")
        made = write_modulation(
            record,
            {"transformer": reader},
            folder,
            schedules=schedules,
            tables=record.tables,
            mode="tables",
            progress=partial(progress, "modulation"),
        )
        if made.record.identity != record.identity:
            raise CheckpointError(
                f"the checkpoint is not the one that {opened.path} was built from; name that of "
                f"{manifest.model.name}, with the same LoRAs",
                option="model",
            )
        added = AddedSchedule(steps=steps, sizes=lacking)
        tables = (*manifest.schedules, *made.tables)
        write_manifest(replace(manifest, schedules=tables, added=(*manifest.added, added)), folder)
    return open_bundle(opened.path.absolute())


def _wanted(manifest: Manifest, steps: int, sizes: Sequence[tuple[int, int]] | None) -> tuple[Size, ...]:
    """The sizes at which tables are wanted.

    Raises:
        RequestError: the bundle takes no such steps or sizes.
    """
    from qie.engines.inputs.sizes import fits

    steps_max = manifest.model.scheduler.num_train_timesteps
    if not 1 <= steps <= steps_max:
        raise RequestError(
            f"the number of steps is {steps}, expected from 1 to {steps_max}; use another number", option="steps"
        )
    if sizes is None:
        return manifest.limits.buckets
    for width, height in sizes:
        if not fits(manifest.limits, width, height):
            raise RequestError(
                f"the bundle does not edit at {width}x{height}; choose a size with sides that are multiples of 16, "
                "within its limits, which `qie inspect` shows",
                option="size",
            )
    return tuple(dict.fromkeys(Size(width=width, height=height) for width, height in sizes))


def _reader(
    bundle: Bundle, model: str | Path | None, revision: str | None, loras: Sequence[LoraSource], progress: Progress
) -> "TensorReader":
    """The transformer of the bundle's checkpoint, with its LoRAs and smoothing.

    Raises:
        CheckpointError: the checkpoint or a LoRA is missing, damaged or seen to be another one.
        BuildError: no checkpoint is known.
    """
    from qie.compiler.checkpoint.checkpoint import open_checkpoint
    from qie.compiler.packing.made_from import bundle_loras, bundle_recipe
    from qie.compiler.packing.readers import checkpoint_readers
    from qie.compiler.planning.plan import make_plan
    from qie.compiler.quantization.calibration import read_calibration

    manifest = bundle.manifest
    known = manifest.model.revision is not None or manifest.model.name == "pocket"
    if model is None and not known:
        raise BuildError(
            f"{bundle.path} has tables alone, and its checkpoint {manifest.model.name} is no hub id; name its folder",
            option="model",
        )
    if model is None:
        model, revision = manifest.model.name, revision or manifest.model.revision
    opened = bundle_loras(bundle, loras)
    checkpoint = open_checkpoint(str(model), revision=revision, weights=False)
    config, record = checkpoint.model.transformer, manifest.model.modulation
    if (config.layers, config.width, config.zero_cond_t) != (record.layers, record.width, record.zero_cond_t):
        raise CheckpointError(
            f"{model} has another transformer than {bundle.path}; name the checkpoint that it was built from",
            option="model",
        )
    calibration = None
    if manifest.calibration is not None:
        path = manifest.calibration.path
        calibration = bundle.folder.read(lambda folder: read_calibration(folder / path))
    plan = make_plan(
        checkpoint.with_weights(progress=partial(progress, "download")),
        recipe_name=manifest.recipe.name,
        recipe=bundle_recipe(bundle),
        loras=opened,
        destination=bundle.path,
        calibration=calibration,
        allow_unread=True,
    )
    return checkpoint_readers(plan)["transformer"]
