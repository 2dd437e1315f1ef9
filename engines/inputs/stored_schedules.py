"""The schedules of which a bundle has modulation tables: their names, and what to do about one that is not there."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import Manifest, ModulationRecord
from qie.engines.bundle.specs import Size
from qie.engines.errors import RequestError
from qie.engines.inputs.schedule import sigmas

__all__ = [
    "SCHEDULES",
    "StoredSchedule",
    "has_tables",
    "made_from",
    "missing_tables",
    "sizes_with_tables",
    "stored_dtype",
    "stored_schedules",
    "table_name",
]

SCHEDULES = "schedules"
"""Folder of precomputed tables in a bundle."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSchedule:
    """A number of steps, and the sizes at which a bundle has tables of so many."""

    steps: int
    sizes: tuple[Size, ...]


def table_name(record: ModulationRecord, sigmas: Array) -> str:
    """File name of the tables of ``sigmas`` in a bundle: a digest of everything that decides their content."""
    return f"{hashlib.sha256(made_from(record, sigmas).encode()).hexdigest()[:32]}.npy"


def made_from(record: ModulationRecord, sigmas: Array) -> str:
    """What decides the content of the tables of ``sigmas``, as a text."""
    return f"{record.identity} {record.zero_cond_t} {record.tables} {sigmas.astype('<f4').tobytes().hex()}"


def stored_dtype(record: ModulationRecord) -> np.dtype[np.generic]:
    """The dtype of a table's file: bfloat16 is stored as its bits."""
    return np.dtype(np.uint16 if record.tables == "bfloat16" else np.float32)


def has_tables(manifest: Manifest, steps: int, size: Size) -> bool:
    """Whether the bundle of ``manifest`` has the tables of so many steps at ``size``."""
    return _path(manifest, steps, size) in {file.path for file in manifest.schedules}


def sizes_with_tables(manifest: Manifest, steps: int) -> tuple[Size, ...]:
    """The sizes, of the buckets and of what was added, at which the bundle has tables of so many steps."""
    stored = {file.path for file in manifest.schedules}
    return tuple(size for size in _sizes(manifest) if _path(manifest, steps, size) in stored)


def stored_schedules(manifest: Manifest) -> tuple[StoredSchedule, ...]:
    """The schedules of which the bundle has tables, from few steps to many.

    The number of steps is that of a table's rows, by the size of its file.
    """
    row = manifest.model.modulation.values * stored_dtype(manifest.model.modulation).itemsize
    steps = sorted({file.bytes // row for file in manifest.schedules})
    possible = [count for count in steps if 1 <= count <= manifest.model.scheduler.num_train_timesteps]
    found = [StoredSchedule(steps=count, sizes=sizes_with_tables(manifest, count)) for count in possible]
    return tuple(schedule for schedule in found if schedule.sizes)


def missing_tables(manifest: Manifest, steps: int, size: Size | None = None) -> RequestError:
    """What to raise where the bundle has neither the tables of so many steps, at ``size``, nor weights to make them."""
    sizes = sizes_with_tables(manifest, steps)
    if sizes and size is not None:
        return RequestError(
            f"this bundle has no modulation tables of {steps} steps at {size}, but at {_listed(sizes)}; choose one of "
            "these sizes, or add it with `qie add-schedule`",
            option="size",
        )
    counts = [schedule.steps for schedule in stored_schedules(manifest)]
    known = f"but of {_listed(counts)}" if counts else "nor of other numbers"
    return RequestError(
        f"this bundle has no modulation tables of {steps} steps, {known}; choose one of these, or add them with "
        "`qie add-schedule`",
        option="steps",
    )


def _listed(things: Sequence[object]) -> str:
    *most, last = map(str, things)
    return f"{', '.join(most)} and {last}" if most else last


def _path(manifest: Manifest, steps: int, size: Size) -> str:
    values = sigmas(manifest.model.scheduler, steps=steps, noise_tokens=size.tokens)
    return f"{SCHEDULES}/{table_name(manifest.model.modulation, values)}"


def _sizes(manifest: Manifest) -> Iterator[Size]:
    added = (size for schedule in manifest.added for size in schedule.sizes)
    return iter(dict.fromkeys((*manifest.limits.buckets, *added)))
