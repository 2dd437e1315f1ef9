"""The calibration of a build whose recipe quantizes and that has none: made once, and kept for the next build.

``$QIE_HOME/calibrations`` has a file KEY.npz of each, and a folder KEY.partial of one that is being made or was
stopped.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import qie
from qie.compiler.checkpoint.checkpoint import Checkpoint, digest_cache, open_checkpoint
from qie.compiler.planning.calibration import (
    SAMPLES,
    calibration_area,
    calibration_model,
    needed_schemes,
)
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.resolve import with_calibration
from qie.compiler.quantization.blockwise import providers
from qie.compiler.quantization.calibration import Calibration, read_calibration, write_calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.partial import PartialCalibration
from qie.compiler.quantization.samples import CalibrationSample, digest, draw_samples, read_images
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.clean import CALIBRATIONS
from qie.engines.bundle.manifest import Component
from qie.engines.errors import CalibrationError
from qie.engines.files import qie_home, try_lock
from qie.engines.folders import WORK_LOCK, remove_leftover
from qie.engines.machine import version_of
from qie.engines.progress import Progress, no_progress

__all__ = ["IMAGES", "WAITING", "calibrated", "for_images"]

IMAGES = Path(__file__).parents[2] / "recipes" / "calibration"
"""The images that come with qie."""

METHOD = 2
"""Changes with what is measured, how, and in which format it is kept, so that what was kept before is made again."""

WAITING = "waiting for another build"
"""What progress is called with while another build makes the calibration."""

_PAUSE = 0.2
"""Seconds between two looks at a calibration that another build makes."""


def for_images(plan: Plan, images: str | Path | None, calibration: str | Path | None = None) -> Plan:
    """``plan``, planned for a calibration that is made of ``images``, before anything is downloaded.

    Args:
        plan: of a build.
        images: folder of images; None for the plan as it is.
        calibration: that was given too.

    Raises:
        CalibrationError: the folder has no images, a calibration is given too, or the recipe does not quantize.
        ImageError: an image cannot be read.
    """
    if images is None:
        return plan
    if calibration is not None:
        raise CalibrationError(
            f"{calibration} is a calibration, and {images} are images to make one of; give one of the two",
            option="images",
        )
    if not plan.recipe.quantizes:
        raise CalibrationError(
            f"the recipe {plan.recipe_name} does not quantize, and images are for a calibration; leave them out",
            option="images",
        )
    read_images(Path(images), SAMPLES)
    return plan if plan.calibration is None else with_calibration(plan, None)


def calibrated(plan: Plan, *, images: str | Path | None = None, progress: Progress = no_progress) -> Plan:
    """``plan`` with a calibration: as it is where it has one or needs none, else planned again with one made here.

    The calibration is of the checkpoint without LoRAs, and of the schemes of the recipe alone. What an earlier call
    made of equal samples and weights is taken; what a stopped one left is continued. Where another process makes the
    same, this one waits.

    Args:
        plan: of a build; missing weights are downloaded.
        images: folder of images; None for the built-in ones where the plan has no calibration. With it, another
            calibration than that of the plan is made.
        progress: called with what runs, units done and units in all.

    Raises:
        CalibrationError: ``images`` has no images, or the calibration cannot be kept in ``qie_home()``.
        CheckpointError: weights are missing, damaged or of another shape.
    """
    if not plan.recipe.quantizes or (plan.calibration is not None and images is None):
        return plan
    checkpoint = _plain(
        plan.checkpoint.with_weights(progress=partial(progress, "download")), plan.recipe.components.transformer.scheme
    )
    samples = draw_samples(read_images(IMAGES if images is None else Path(images), SAMPLES), INSTRUCTIONS, SAMPLES)
    model = checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    schemes = needed_schemes(plan.recipe)
    key = _key(checkpoint, model, samples, schemes)
    folder = qie_home() / CALIBRATIONS
    path = folder / f"{key}.npz"
    kept = _kept(path, model)
    if kept is None:
        with _working(folder / f"{key}.partial", progress) as work:
            kept = _kept(path, model)
            if kept is None:
                made = measure(
                    checkpoint,
                    checkpoint.readers(),
                    samples,
                    model=model,
                    schemes=schemes,
                    partial=PartialCalibration(path=work / "reached", key=key),
                    progress=progress,
                )
                with _writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)  # as it may have been deleted meanwhile
                    write_calibration(made, path)
                shutil.rmtree(work / "reached", ignore_errors=True)
                kept = read_calibration(path)
        remove_leftover(folder / f"{key}.partial")
    return with_calibration(plan, kept)


def _plain(checkpoint: Checkpoint, scheme: SchemeName) -> Checkpoint:
    """``checkpoint`` with its own schedule, and images of the area of samples; ``scheme`` is the transformer's."""
    own = open_checkpoint(str(checkpoint.path), weights=False).model
    return replace(checkpoint, model=calibration_model(own, calibration_area(scheme)))


def _key(
    checkpoint: Checkpoint,
    model: str,
    samples: Sequence[CalibrationSample],
    schemes: Mapping[Component, Sequence[SchemeName]],
) -> str:
    """Digest of everything that decides a calibration."""
    packages = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "tokenizers")
    decides = {
        "method": METHOD,
        "model": model,
        "samples": digest(samples),
        "schemes": {component: list(names) for component, names in schemes.items()},
        "area": checkpoint.model.areas.vae_area,
        "versions": {"qie": qie.__version__, **{package: version_of(package) for package in packages}},
        "providers": providers(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, model: str) -> Calibration | None:
    """The calibration that an earlier build kept; None where there is none, or a damaged one."""
    with suppress(CalibrationError):
        calibration = read_calibration(path)
        calibration.check_model(model)
        return calibration
    return None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say what to do where ``folder`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise CalibrationError(
            f"a calibration cannot be kept in {folder} ({error.strerror}); set QIE_HOME to a folder with free space"
        ) from error


@contextmanager
def _working(folder: Path, progress: Progress) -> Iterator[Path]:
    """The folder of a calibration that is being made, held by this process; waits while another one holds it."""
    waited = False
    while (descriptor := _hold(folder)) is None:
        if not waited:
            progress(WAITING, 0, 1)
        waited = True
        time.sleep(_PAUSE)
    try:
        if waited:
            progress(WAITING, 1, 1)
        yield folder
    finally:
        os.close(descriptor)


def _hold(folder: Path) -> int | None:
    """The descriptor of the lock of ``folder``, which is made where it is absent; None while another process has it."""
    with _writing(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / WORK_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return None  # it was deleted meanwhile
    if try_lock(descriptor, exclusive=True) is not False and os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None
