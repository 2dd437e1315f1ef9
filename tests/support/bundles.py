"""Plans and bundles of the tests' checkpoints."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qie.compiler.packing import build as packing
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.resolve import LoraSource, plan_build
from qie.compiler.recipe.schema import Recipe, to_toml
from qie.engines.bundle.bundle import Bundle
from qie.engines.progress import Progress, no_progress

__all__ = ["build", "in_hub_cache", "linked", "planned"]


def planned(
    checkpoint: Path | str,
    destination: Path,
    gpu: str | Recipe = "cpu",
    *,
    loras: Sequence[LoraSource] = (),
    calibration: Path | None = None,
    weights: bool = True,
    memory_gib: float | None = None,
) -> Plan:
    """Plan the bundle of ``checkpoint`` in the folder ``destination``.

    Args:
        checkpoint: A folder, or ``"pocket"``.
        destination: Of the bundle.
        gpu: The recipe: a name, a path, the text of a TOML file or a recipe itself (the last two are written as
            ``mine.toml`` beside ``destination``).
        loras: Fused into the weights, in this order.
        calibration: What a recipe that quantizes needs to be built.
        weights: False for a checkpoint of configs alone.
        memory_gib: Of the host, that the build may use.
    """
    text = to_toml(gpu) if isinstance(gpu, Recipe) else gpu
    if "\n" in text:
        destination.parent.mkdir(parents=True, exist_ok=True)
        path = destination.with_name("mine.toml")
        path.write_text(text)
        text = str(path)
    plan = plan_build(
        checkpoint, gpu=text, loras=loras, calibration=calibration, out=destination, memory_gib=memory_gib
    )
    return replace(plan, checkpoint=plan.checkpoint.with_weights()) if weights else plan


def build(
    checkpoint: Path | str,
    destination: Path,
    gpu: str | Recipe = "cpu",
    *,
    loras: Sequence[LoraSource] = (),
    calibration: Path | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Build what ``planned`` plans."""
    plan = planned(checkpoint, destination, gpu, loras=loras, calibration=calibration, weights=False)
    return packing.build(plan, progress=progress)


def linked(bundle: Path, destination: Path) -> Path:
    """A copy of a bundle that shares its files; none but the manifest may be written in place."""
    copy = Path(shutil.copytree(bundle, destination, copy_function=os.link))
    (copy / "manifest.json").unlink()  # readers and writers lock it
    shutil.copy2(bundle / "manifest.json", copy)
    return copy


def in_hub_cache(bundle: Path, cache: Path) -> Path:
    """``bundle`` copied as huggingface_hub lays out what it downloads: snapshots/COMMIT/FILE links to blobs/DIGEST."""
    repository = cache / "models--owner--bundle"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in bundle.rglob("*") if path.is_file())):
        blob, link = repository / "blobs" / str(number), snapshot / file.relative_to(bundle)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
