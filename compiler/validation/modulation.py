"""The modulation tables of a bundle against what the modulation weights of its model give."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qie.compiler.metrics.error import relative_l2
from qie.compiler.recipe.schema import Recipe
from qie.engines.bfloat16 import widen
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import FileRecord, Manifest
from qie.engines.bundle.specs import Size
from qie.engines.inputs.modulation import BundleModulation, compute_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.stored_schedules import SCHEDULES, table_name
from qie.engines.progress import StageProgress, no_progress

__all__ = ["TableError", "table_differences", "table_errors"]

Floats = NDArray[np.float32]

ROWS_BYTES = 1 << 30
"""Memory for the rows that are computed again: all of a small model, some of every table of a large one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableError:
    """One stored table.

    Attributes:
        path: in the bundle.
        steps: rows that were compared.
        error: relative L2 error of the stored rows; infinite for a table of another size.
    """

    path: str
    steps: int
    error: float


def table_errors(
    bundle: Bundle, recipe: Recipe, *, weights: Bundle | None = None, progress: StageProgress = no_progress
) -> list[TableError]:
    """Compute rows of every stored table again, with one pass over the modulation weights.

    A table that no schedule leads to is not compared; ``table_differences`` has it.

    Args:
        bundle: whose tables are compared.
        recipe: of the bundle.
        weights: a bundle of the same model with the weights; None for ``bundle`` itself.
        progress: called with the blocks done and the blocks in all.
    """
    record = bundle.manifest.model.modulation
    tables = list(_tables(bundle, recipe))
    if not tables:
        return []
    rows = max(2, ROWS_BYTES // 4 // record.values // len(tables))
    chosen = [_spread(len(schedule_S) - 1, rows) for _, schedule_S in tables]
    wanted = [schedule_S[steps] for (_, schedule_S), steps in zip(tables, chosen, strict=True)]
    source = bundle if weights is None else weights
    opened = source.folder.read(lambda folder: BundleModulation(folder, source.manifest.model.modulation))
    everything = np.append(np.concatenate(wanted), np.float32(0))
    computed = iter(compute_tables(opened, record, everything, progress=progress))
    found = []
    for (file, schedule_S), steps in zip(tables, chosen, strict=True):
        expected = np.stack([next(computed) for _ in steps])
        stored = _read(bundle, file)
        fits = stored.shape == (len(schedule_S) - 1, record.values)
        error = relative_l2(stored[steps], expected) if fits else float("inf")
        found.append(TableError(path=file.path, steps=len(steps), error=error))
    return found


def table_differences(bundle: Bundle, recipe: Recipe) -> tuple[list[tuple[int, Size]], list[str]]:
    """The tables that ``bundle`` lacks and those that it should not have.

    Returns:
        (steps, size) of the default schedule at every size of the recipe without a table; and the paths of stored
        tables to which no schedule leads.
    """
    manifest = bundle.manifest
    stored = {file.path for file in manifest.schedules}
    explained = {file.path for file, _ in _tables(bundle, recipe)}
    first, steps = recipe.schedules[0], manifest.defaults.steps
    sizes = recipe.schedule_sizes(first, manifest.model.areas.vae_area)
    missing = [(steps, size) for size in sizes if _table(manifest, steps, size.tokens)[0] not in stored]
    return missing, sorted(stored - explained)


def _table(manifest: Manifest, steps: int, noise_tokens: int) -> tuple[str, Floats]:
    """The path of the table of a schedule, and the schedule, float32 [S + 1]."""
    schedule_S = sigmas(manifest.model.scheduler, steps=steps, noise_tokens=noise_tokens)
    return f"{SCHEDULES}/{table_name(manifest.model.modulation, schedule_S)}", schedule_S


def _tables(bundle: Bundle, recipe: Recipe) -> Iterator[tuple[FileRecord, Floats]]:
    """The stored tables with the schedules of recipe and additions, float32 [S + 1], that lead to them."""
    manifest = bundle.manifest
    stored = {file.path: file for file in manifest.schedules}
    steps = {manifest.defaults.steps, *(schedule.steps for schedule in recipe.schedules)}
    known = {(count, size.tokens) for count in steps for size in manifest.limits.buckets}
    known |= {(schedule.steps, size.tokens) for schedule in manifest.added for size in schedule.sizes}
    for count, noise_tokens in sorted(known):
        path, schedule_S = _table(manifest, count, noise_tokens)
        file = stored.pop(path, None)
        if file is not None:
            yield file, schedule_S


def _spread(count: int, rows: int) -> NDArray[np.int64]:
    """At most ``rows`` of ``count`` steps, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, rows)).round().astype(np.int64))


def _read(bundle: Bundle, file: FileRecord) -> Floats:
    return widen(bundle.folder.read(lambda folder: np.load(folder / file.path, allow_pickle=False)))
