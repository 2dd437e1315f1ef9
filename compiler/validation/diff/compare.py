"""Two bundles compared as far as this machine goes: their content, and their velocities where both run here."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from qie.compiler.validation.diff.diff import BundleDiff, VelocityDiff, diff_bundles
from qie.compiler.validation.diff.velocity import diff_velocities
from qie.compiler.validation.golden.file import Golden, open_golden
from qie.compiler.validation.golden.match import own_golden, unlike
from qie.engines.bundle.bundle import Bundle
from qie.engines.errors import BackendMissingError, BundleError, EngineMismatchError, GoldenError
from qie.engines.progress import Progress, StageProgress, no_progress
from qie.engines.sessions.choose import choose_engines

__all__ = ["compare"]


def compare(
    old: Bundle,
    new: Bundle,
    *,
    golden: Path | None = None,
    device: int | None = None,
    progress: Progress = no_progress,
) -> BundleDiff:
    """What differs between two bundles.

    Args:
        old: an opened bundle.
        new: another one, or the same.
        golden: golden file of the model; None for the one that comes with the pocket model.
        device: CUDA index of the GPU that runs both; None for the first that fits.
        progress: called with ("compare" or "velocity", units done, units in all).

    Raises:
        BundleError: a file of a bundle is damaged.
        GoldenError: the golden file that was named is damaged or of another model.
        EngineError: a backend failed or memory ran out.
    """
    found = diff_bundles(old, new, progress=partial(progress, "compare"))
    return replace(found, velocity=_velocity(old, new, golden, device, partial(progress, "velocity")))


def _velocity(old: Bundle, new: Bundle, path: Path | None, device: int | None, progress: StageProgress) -> VelocityDiff:
    golden = _golden(old, path)
    if golden is None:
        return VelocityDiff(
            golden=None, not_run="there is no golden file of the model; record one with `qie golden` and name it"
        )
    obstacle = _obstacle(old, new, golden, device)
    steps = () if obstacle is not None else diff_velocities(old, new, golden, device=device, progress=progress)
    return VelocityDiff(golden=golden.path.name, not_run=obstacle, steps=steps)


def _golden(old: Bundle, path: Path | None) -> Golden | None:
    """The golden file ``path``, or that of the pocket model where ``old`` is of it."""
    if path is not None:
        golden = open_golden(path)
        if unlike(golden, old):
            raise GoldenError(
                f"the golden file {path} is of {golden.record.model} with other weights or LoRAs than {old.name}; name "
                "one of its model",
                option="golden",
            )
        return golden
    file = own_golden(old)
    if file is None:
        return None
    golden = open_golden(file)
    return None if unlike(golden, old) else golden


def _obstacle(old: Bundle, new: Bundle, golden: Golden, device: int | None) -> str | None:
    """Why the velocities cannot be compared, a semicolon, and what to do; None where they can."""
    if unlike(golden, new):
        return f"{new.name} is of another model than {old.name} or has other LoRAs; compare bundles of one model"
    for bundle in (old, new):
        try:
            choose_engines(bundle, device)
        except (EngineMismatchError, BackendMissingError, BundleError) as problem:
            return str(problem)
    return None
