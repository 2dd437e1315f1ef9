"""The compiler's one call: a model, or a plan of its build, becomes a bundle.

What needs ``qie[compile]`` is imported after the plan, which says so where it is not installed.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

from qie.compiler.planning.resolve import LoraSource, plan_build
from qie.engines.bundle.bundle import Bundle
from qie.engines.progress import Progress, no_progress

if TYPE_CHECKING:
    from qie.compiler.planning.plan import Plan

__all__ = ["build"]


@overload
def build(
    model: "Plan", *, images: str | Path | None = ..., stream: bool = ..., progress: Progress = ...
) -> Bundle: ...


@overload
def build(
    model: str | Path,
    *,
    gpu: str | Path = ...,
    loras: Sequence[LoraSource] = ...,
    calibration: str | Path | None = ...,
    images: str | Path | None = ...,
    out: str | Path | None = ...,
    name: str | None = ...,
    revision: str | None = ...,
    schedule: str | None = ...,
    allow_unread: bool = ...,
    device: int | None = ...,
    language: str | None = ...,
    memory_gib: float | None = ...,
    stream: bool = ...,
    progress: Progress = ...,
) -> Bundle: ...


def build(
    model: "str | Path | Plan",
    *,
    gpu: str | Path = "cpu",
    loras: Sequence[LoraSource] = (),
    calibration: str | Path | None = None,
    images: str | Path | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    schedule: str | None = None,
    allow_unread: bool = False,
    device: int | None = None,
    language: str | None = None,
    memory_gib: float | None = None,
    stream: bool = False,
    progress: Progress = no_progress,
) -> Bundle:
    """Build a bundle and put it at its destination, in place of an earlier one.

    What cannot be built, does not fit or lacks disk space is rejected before weights are downloaded. Engines and
    modulation tables of an earlier bundle with an equal key and undamaged files are kept. What a build that failed or
    was stopped had completed is taken up by the next build of the same destination. Where the recipe quantizes and
    there is no calibration, one is made (``calibrated``).

    Args:
        model: a plan, or a model as ``plan_build`` takes it; the arguments of that name belong to the latter.
        gpu: see ``plan_build``.
        loras: see ``plan_build``.
        calibration: see ``plan_build``.
        images: folder of images to make the calibration of, with or without a plan; None for the built-in ones where
            one has to be made.
        out: see ``plan_build``.
        name: see ``plan_build``.
        revision: see ``plan_build``.
        schedule: see ``plan_build``.
        allow_unread: see ``plan_build``.
        device: see ``plan_build``.
        language: see ``plan_build``.
        memory_gib: see ``plan_build``.
        stream: fetch weights one shard at a time and delete each when it was read, so that the disk never holds the
            checkpoint. A folder that has its weights is read as it is.
        progress: called with (kind of work, bytes or units done, bytes or units in all); while weights are downloaded
            or fetched also from another thread.

    Raises:
        QieError: the model cannot be planned (see ``plan_build``) or built (see ``check_buildable``, ``check_fit`` and
            ``check_download``), its weights are damaged, or a builder failed. Nothing is left that loads.
    """
    if isinstance(model, str | Path):
        plan = plan_build(
            model,
            gpu=gpu,
            loras=loras,
            calibration=calibration,
            out=out,
            name=name,
            revision=revision,
            schedule=schedule,
            allow_unread=allow_unread,
            device=device,
            language=language,
            memory_gib=memory_gib,
        )
    else:
        decided = (gpu, tuple(loras), calibration, out, name, revision, schedule, allow_unread, device, language)
        assert (*decided, memory_gib) == ("cpu", (), None, None, None, None, None, False, None, None, None), (
            "a plan has decided these arguments"
        )
        plan = model

    from qie.compiler.packing.calibrate import calibrated, for_images
    from qie.compiler.packing.pack import pack
    from qie.compiler.packing.pieces import open_pieces
    from qie.compiler.packing.shard_sources import check_whole, shard_source
    from qie.compiler.packing.writing import disk_errors
    from qie.compiler.planning.checks import check_buildable, check_download
    from qie.compiler.planning.fit import check_fit
    from qie.engines.folders import clear_leftovers

    plan = for_images(plan, images, calibration)
    clear_leftovers(plan.destination.resolve())
    source = shard_source(plan.checkpoint) if stream else None
    check_buildable(plan, more_bytes=0 if source is None else max(shard.bytes for shard in source.shards.values()))
    check_fit(plan)
    if source is None:
        check_whole(plan.checkpoint)
        check_download(plan.checkpoint, destination=plan.destination, output_bytes=plan.disk_bytes)
    with ExitStack() as stack:
        with disk_errors(plan.destination, plan.disk_bytes):
            pieces = stack.enter_context(open_pieces(plan.destination))
        if source is None:
            checkpoint = plan.checkpoint.with_weights(progress=partial(progress, "download"))
        else:
            checkpoint = plan.checkpoint.streamed(source, pieces.folder / "shard", progress=partial(progress, "fetch"))
        plan = calibrated(replace(plan, checkpoint=checkpoint), images=images, progress=progress)
        with disk_errors(plan.destination, plan.disk_bytes):
            return pack(plan, pieces, progress=progress)
