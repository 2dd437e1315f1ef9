"""Adds the modulation tables of a schedule to a bundle."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.planning.resolve import LoraSource, compile_packages
from qie.engines.bundle.bundle import Bundle, check_file, open_bundle
from qie.engines.bundle.manifest import AddedSchedule
from qie.engines.errors import BuildError, BundleError, CheckpointError
from qie.engines.progress import Progress, no_progress

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
    the LoRAs that it was built from. Weights of the checkpoint that are not on this machine are fetched one shard at a
    time, and only those that hold modulation. The bundle is replaced when the tables are complete; until then it stays
    unchanged. All other files stay the same. A bundle that has the tables stays as it is.

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
        BuildError: no checkpoint is known, the disk is too small, or the bundle was replaced or deleted meanwhile.
    """
    with compile_packages():
        from qie.compiler.packing.schedule_plan import plan_schedule
        from qie.compiler.packing.take_over import take_over
        from qie.compiler.packing.writing import check_unchanged, writing
        from qie.compiler.weights.modulation import write_modulation
        from qie.compiler.weights.stored_modulation import StoredModulation
    from qie.engines.bundle.sealed import write_manifest

    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    planned = plan_schedule(opened, steps=steps, sizes=sizes, model=model, revision=revision, loras=loras)
    if not planned.sizes:
        return opened
    check_unchanged(opened)
    needed, free = planned.disk_bytes, shutil.disk_usage(opened.path).free
    if needed > free:
        raise BuildError(f"the tables for {opened.path} need {needed:,} bytes, and {free:,} are free; free some space")
    manifest, record = opened.manifest, opened.manifest.model.modulation
    with writing(opened.path, needed, replaces=opened) as folder:
        shard = folder / "shard"
        if record.file is None:
            reader = planned.reader(shard, progress=progress)
        else:
            check_file(opened, record.file)
            reader = opened.folder.read(lambda place: StoredModulation(place, record))
        if not take_over(manifest.files(), opened, folder):
            raise BundleError(f"{opened.path} is damaged; build the bundle again with `qie build`")
        made = write_modulation(
            record,
            {"transformer": reader},
            folder,
            schedules=planned.schedules,
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
        shutil.rmtree(shard, ignore_errors=True)
        added = AddedSchedule(steps=steps, sizes=planned.sizes)
        tables = (*manifest.schedules, *made.tables)
        write_manifest(replace(manifest, schedules=tables, added=(*manifest.added, added)), folder)
    return open_bundle(opened.path.absolute())
