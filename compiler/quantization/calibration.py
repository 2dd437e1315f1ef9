"""Calibration files: statistics of the inputs of a model's linears over samples of edits.

A calibration is one numpy .npz file without pickles. It is made once, on any machine, and serves every build of that
model. Its arrays are ``amax/NAME`` and ``smoothing/SCHEME/GROUP``; ``about`` is JSON with everything else.
"""

import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.recipe.schema import SchemeName
from qie.engines.errors import CalibrationError, first_line
from qie.engines.files import replacing
from qie.engines.records import Range, brief, from_plain

__all__ = ["FILE", "Calibration", "find_calibration", "read_calibration", "write_calibration"]

SCHEMA = 2
"""Version of the format."""

FILE = "calibration.npz"
"""Name of the file in the folder of a checkpoint or a bundle."""

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Calibration:
    """Statistics over ``samples`` forward passes, and what follows from them.

    Attributes:
        model: digest of the checkpoint.
        name: name of the checkpoint.
        data: sha256 of the samples' images, instructions and sigmas.
        samples: number of forward passes.
        amax: linear -> largest magnitude of each channel of its input [in]; also of attention's queries, keys and
            values.
        smoothing_scales: scheme -> group -> smoothing scales [channels].
        alphas: scheme -> group -> the alpha of these scales.
        exclude: "component/scheme" -> linears to exclude from quantization, where they were measured.
        source: the file that it was read from, None before it is written.
        sha256: sha256 of that file.
    """

    model: str
    name: str
    data: str
    samples: int
    amax: Mapping[str, Array]
    smoothing_scales: Mapping[SchemeName, Mapping[str, Array]] = field(default_factory=dict)
    alphas: Mapping[SchemeName, Mapping[str, float]] = field(default_factory=dict)
    exclude: Mapping[str, Sequence[str]] = field(default_factory=dict)
    source: Path | None = None
    sha256: str | None = None

    def check_model(self, digest: str) -> None:
        """Check that the calibration belongs to the model with that digest.

        Raises:
            CalibrationError: it belongs to another one.
        """
        if self.model != digest:
            raise CalibrationError(
                f"{self.source} belongs to another model ({self.name}, {self.model[:12]}), expected {digest[:12]}; "
                "calibrate this one with `qie calibrate`"
            )

    def check_linears(self, names: Sequence[str]) -> None:
        """Check that the calibration has statistics of the linears ``names``.

        Raises:
            CalibrationError: one is missing.
        """
        missing = [name for name in names if name not in self.amax]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CalibrationError(
                f"{self.source} has no statistics of {missing[0]!r}{more}; make it again with `qie calibrate`"
            )


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write ``calibration`` to ``path``, replacing an earlier file; equal calibrations have equal bytes."""
    about = {
        "schema": SCHEMA,
        "model": calibration.model,
        "name": calibration.name,
        "data": calibration.data,
        "samples": calibration.samples,
        "alphas": calibration.alphas,
        "exclude": calibration.exclude,
    }
    arrays: dict[str, Any] = {"about": np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)}
    arrays |= {f"amax/{name}": values for name, values in calibration.amax.items()}
    for scheme, scales in calibration.smoothing_scales.items():
        arrays |= {f"smoothing/{scheme}/{group}": values for group, values in scales.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def find_calibration(path: str | Path | None, checkpoint: Path) -> Calibration | None:
    """The calibration in the file ``path``, or else in the folder ``checkpoint``; None where there is none.

    Raises:
        CalibrationError: see ``read_calibration``.
    """
    if path is not None:
        return read_calibration(Path(path))
    own = checkpoint / FILE
    return read_calibration(own) if own.is_file() else None


LONGEST = 1 << 30
"""Bytes of a calibration file; that of the published models has about 100 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _About:
    """The JSON in a calibration file."""

    schema: int
    model: str
    name: str
    data: str
    samples: Annotated[int, Range(1, 1 << 31)]
    alphas: dict[SchemeName, dict[str, Annotated[float, Range(0, 1)]]]
    exclude: dict[str, tuple[str, ...]]


def _arrays(content: bytes) -> dict[str, Any]:
    """The arrays of a calibration file, whose members are stored as they are: nothing is larger than the file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(member.file_size != member.compress_size for member in archive.infolist()):
            raise ValueError("compressed members")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if not all(isinstance(values, np.ndarray) for values in arrays.values()):
        raise ValueError("members that are no arrays")
    return arrays


def read_calibration(path: Path) -> Calibration:
    """The calibration in the file ``path``.

    Raises:
        CalibrationError: the file cannot be read, is no calibration, is damaged, has another schema, or has statistics
            that no model can have.
    """
    fix = "make it again with `qie calibrate`"
    try:
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if path.stat().st_size > LONGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes, expected at most {LONGEST:,}")
        content = path.read_bytes()
    except (OSError, ValueError) as problem:
        raise CalibrationError(
            f"cannot read the calibration {path} ({first_line(problem)}); check the path"
        ) from problem
    try:
        arrays = _arrays(content)
        plain = json.loads(arrays.pop("about").tobytes())
        schema = plain["schema"]
        about = from_plain(_About, plain) if schema == SCHEMA else None
    except Exception as problem:  # zipfile and numpy raise whatever the bytes lead to
        raise CalibrationError(
            f"{path} is not a qie calibration, or is damaged ({first_line(problem)}); {fix}"
        ) from problem
    if about is None:
        raise CalibrationError(f"{path} has schema {brief(schema)}, expected {SCHEMA}; {fix}")
    amax: dict[str, Array] = {}
    smoothing_scales: dict[Any, dict[str, Array]] = {}
    for key, values in arrays.items():
        kind, _, name = key.partition("/")
        if values.dtype != np.float32 or values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
            raise CalibrationError(f"{path} has negative or non-finite values in {key}; {fix}")
        if kind == "amax":
            if not values.any():
                raise CalibrationError(f"{path} has only zeros for the input of {name}; {fix} and other images")
            amax[name] = values
        else:
            scheme, _, group = name.partition("/")
            if not values.all():
                raise CalibrationError(f"{path} has smoothing scales of 0 in {key}; {fix}")
            smoothing_scales.setdefault(scheme, {})[group] = values
    return Calibration(
        model=about.model,
        name=about.name,
        data=about.data,
        samples=about.samples,
        alphas=dict(about.alphas),
        exclude=dict(about.exclude),
        amax=amax,
        smoothing_scales=smoothing_scales,
        source=path,
        sha256=hashlib.sha256(content).hexdigest(),
    )
