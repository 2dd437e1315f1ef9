"""Edits that are timed: one cold, some to warm up, then those that count."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from PIL import Image

import qie
from qie.compiler.validation.timing.record import WHOLE, Conditions, StageTime, Timing
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.specs import Size
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.sizes import resolve_size
from qie.engines.machine import choose_gpu, this_machine
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.choose import choose_engines

__all__ = ["INSTRUCTION", "Workload", "time_bundle", "time_edits", "workload"]

INSTRUCTION = "make the sky pink"
SEED = 0

OTHER = "other"
"""What is in no stage: the checks of a request, the host's share of conditioning, loading the transformer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """An edit to time.

    Attributes:
        bundle: whose engines run.
        request: of every edit.
        device: CUDA index of the GPU; None for the first that fits.
        conditions: that another timing must share.
    """

    bundle: Bundle
    request: Request
    device: int | None
    conditions: Conditions


def workload(
    bundle: Bundle,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    device: int | None = None,
) -> Workload:
    """The edit of one image of the size of the result by one instruction, always the same.

    Args:
        bundle: an opened bundle that this machine can run.
        size: (width, height) of the result; None for a square of the model's area.
        steps: None is the bundle's default.
        guidance: None is the bundle's default.
        device: CUDA index of the GPU.

    Raises:
        EngineMismatchError, BackendMissingError, BundleError: this machine cannot run the bundle.
        RequestError: the bundle does not take such an edit.
    """
    manifest, machine = bundle.manifest, this_machine()
    engines = choose_engines(bundle, device)
    side = math.isqrt(manifest.model.areas.vae_area)
    taken, _ = resolve_size(manifest.limits, *(size or (side, side)))
    image = Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (taken.height, taken.width, 3), np.uint8))
    request = Request(
        images=[image], instructions=[INSTRUCTION], seeds=[SEED], steps=steps, guidance=guidance, size=size
    )
    settings = resolve(request, manifest)
    capability = next((c for e, *_ in engines.values() if (c := e.compute_capability) != "cpu"), None)
    conditions = Conditions(
        cpu=machine.cpu,
        cores=machine.cores,
        gpu=None if capability is None else choose_gpu(machine, capability, device).name,
        model=manifest.model.name,
        digest=manifest.model.digest,
        loras=tuple(f"{lora.name}:{lora.weight:g}" for lora in manifest.loras),
        size=settings.size,
        input_size=Size(width=image.width, height=image.height),
        steps=settings.steps,
        guidance=settings.guidance,
    )
    return Workload(bundle=bundle, request=request, device=device, conditions=conditions)


def time_bundle(work: Workload, *, warm_up: int, repeats: int, progress: StageProgress = no_progress) -> Timing:
    """Time the edit ``work`` in an editor of its own.

    Args:
        work: from ``workload``.
        warm_up: edits before the measured ones, after the first, which loads the engines.
        repeats: measured edits, at least 1.
        progress: called with (edits done, edits in all).

    Raises:
        EngineError: a backend failed or memory ran out.
    """
    created = datetime.now(UTC).isoformat(timespec="seconds")
    used: list[int] = []
    with ExitStack() as stack:
        editors: list[Editor] = []

        def edit() -> Mapping[str, float]:
            if editors:
                return editors[0].edit(work.request).seconds
            uncached = EncoderCache(bytes_max=0)  # all edits are equal, and every stage of each is timed
            editor = stack.enter_context(Editor(work.bundle, device=work.device, encoder_cache=uncached))
            editors.append(editor)
            watch = (lambda *_: used.append(_gpu_bytes(editor))) if work.conditions.gpu is not None else _ignore
            return editor.edit(work.request, progress=watch).seconds

        stages = time_edits(edit, warm_up=warm_up, repeats=repeats, progress=progress)
        engines = editors[0].stages.engines
    manifest = work.bundle.manifest
    return Timing(
        schema=1,
        qie=qie.__version__,
        created=created,
        bundle=work.bundle.name,
        recipe=manifest.recipe.name,
        engines=tuple(
            f"{name}: {e.backend} {e.backend_version}, {e.precision}, {e.compute_capability}"
            + (f", {len(others) + 1} parts" if others else "")
            for name, (e, *others) in engines.items()
        ),
        machine=this_machine(),
        conditions=work.conditions,
        warm_up=warm_up,
        stages=stages,
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        gpu_peak_bytes=max(used, default=0) or None,
    )


def time_edits(
    edit: Callable[[], Mapping[str, float]],
    *,
    warm_up: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: StageProgress = no_progress,
) -> tuple[StageTime, ...]:
    """Call ``edit`` once cold, ``warm_up`` times, then ``repeats`` times.

    Args:
        edit: runs an edit and gives the seconds of its stages.
        warm_up: calls that do not count.
        repeats: calls that count.
        clock: seconds that only grow.
        progress: called with (calls done, calls in all).
    """
    assert repeats >= 1, repeats
    total = 1 + warm_up + repeats
    runs: list[dict[str, float]] = []
    for number in range(total):
        progress(number, total)
        start = clock()
        stages = dict(edit())
        whole = clock() - start
        runs.append(stages | {OTHER: max(0.0, whole - sum(stages.values())), WHOLE: whole})
    progress(total, total)
    first, measured = runs[0], runs[1 + warm_up :]
    names = [name for name in dict.fromkeys(name for run in runs for name in run) if name not in (OTHER, WHOLE)]
    return tuple(
        StageTime(stage=name, first=first.get(name, 0.0), seconds=tuple(run.get(name, 0.0) for run in measured))
        for name in (*names, OTHER, WHOLE)
    )


def _ignore(*_: object) -> None:
    """Progress of an edit on a CPU."""


def _gpu_bytes(editor: Editor) -> int:
    """Memory of the GPU in use; 0 before the first engine and where the backend has a memory of its own."""
    from qie.engines.sessions import cuda

    if editor.stages.device is None:
        return 0
    free, total = cuda.memory()
    return total - free
