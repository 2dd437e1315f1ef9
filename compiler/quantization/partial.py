"""How far a calibration has come, kept after every block: a stopped one continues from it.

A folder has the file ``state``, which is replaced after every block, with the samples' values and the digests of the
files ``0.found``, ``1.found`` and so on, each with the statistics of one block.

A file is the length of a header, the header in JSON, the arrays it names one after the other, and the sha256 of all
that. What does not have its sha256, or is of another calibration, counts as absent.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qie.compiler.quantization.blockwise import Values
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.quantization.statistics import Found
from qie.engines.bundle.manifest import Component
from qie.engines.files import replacing

__all__ = ["PartialCalibration", "Reached"]

_LENGTH_BYTES, _DIGEST_BYTES = 8, 32

_LONGEST_HEADER = 1 << 26


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reached:
    """Where a calibration is.

    Attributes:
        component: the component that the samples run through.
        segments: number of its segments behind them.
        samples: values of each sample that segments ahead read.
        found: component -> statistics of its linears so far; those of one linear are never changed.
    """

    component: Component
    segments: int
    samples: Sequence[Values]
    found: Mapping[str, Found]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PartialCalibration:
    """The files of one calibration, for one process at a time.

    Attributes:
        path: their folder.
        key: digest of everything that decides the result.
    """

    path: Path
    key: str
    _files: list[str] = field(default_factory=list, init=False, repr=False)
    """Digest of each file of statistics."""
    _written: set[str] = field(default_factory=set, init=False, repr=False)
    """Names of the arrays in them."""

    def write(self, reached: Reached) -> None:
        """Keep this; what cannot be written is not worth a failure."""
        with suppress(OSError):
            self._write(reached)

    def _write(self, reached: Reached) -> None:
        self.path.mkdir(exist_ok=True)
        arrays = _statistics(reached.found)
        new = {name: values for name, values in arrays.items() if name not in self._written}
        if new:
            alphas = {component: each.alphas for component, each in reached.found.items()}
            self._files.append(_write_file(self._of(len(self._files)), {"alphas": alphas}, new))
            self._written.update(new)
        samples = {f"{n}/{name}": values for n, sample in enumerate(reached.samples) for name, values in sample.items()}
        about = {
            "key": self.key,
            "component": reached.component,
            "segments": reached.segments,
            "samples": len(reached.samples),
            "found": list(reached.found),
            "files": self._files,
        }
        _write_file(self._state, about, samples)

    def read(self) -> Reached | None:
        """What was kept; None where there is nothing, or a damaged file, or one of another calibration."""
        self._files.clear()
        self._written.clear()
        try:
            return self._read()
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            OverflowError,
            RecursionError,
            StopIteration,
        ):
            self._files.clear()
            self._written.clear()
            return None

    def _read(self) -> Reached:
        about, arrays, _ = _read_file(self._state)
        if about["key"] != self.key:
            raise ValueError("another calibration")
        found = {component: Found() for component in about["found"]}
        samples: list[Values] = [{} for _ in range(about["samples"])]
        for name, values in arrays.items():
            sample, value = name.split("/", 1)
            samples[int(sample)][value] = values
        for number, expected in enumerate(about["files"]):
            more, arrays, digest = _read_file(self._of(number))
            if digest != expected:
                raise ValueError("of another state")
            for name, values in arrays.items():
                component, kind, rest = name.split("/", 2)
                if kind == "amax":
                    found[component].amax[rest] = values
                else:
                    scheme = next(scheme for scheme in SCHEMES if rest.startswith(f"{scheme}/"))
                    group = rest.removeprefix(f"{scheme}/")
                    found[component].add(scheme, group, more["alphas"][component][scheme][group], values)
            self._files.append(digest)
            self._written.update(arrays)
        return Reached(component=about["component"], segments=about["segments"], samples=samples, found=found)

    @property
    def _state(self) -> Path:
        return self.path / "state"

    def _of(self, number: int) -> Path:
        return self.path / f"{number}.found"


def _statistics(found: Mapping[str, Found]) -> dict[str, NDArray[Any]]:
    """All statistics by a name of their own."""
    arrays: dict[str, NDArray[Any]] = {}
    for component, each in found.items():
        arrays |= {f"{component}/amax/{name}": values for name, values in each.amax.items()}
        for scheme, scales in each.smoothing_scales.items():
            arrays |= {f"{component}/smoothing/{scheme}/{group}": values for group, values in scales.items()}
    return arrays


def _write_file(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Write one file, whole or not at all; its sha256."""
    listed = [[name, values.dtype.name, list(values.shape)] for name, values in arrays.items()]
    header = json.dumps({**about, "arrays": listed}).encode()
    sha256 = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        for part in (len(header).to_bytes(_LENGTH_BYTES, "little"), header, *arrays.values()):
            content = part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            sha256.update(content)
            file.write(content)
        file.write(sha256.digest())
    return sha256.hexdigest()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]], str]:
    """The header, the arrays and the sha256 of one file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    with path.open("rb") as file:
        return _parse(file)


def _parse(file: BinaryIO) -> tuple[dict[str, Any], dict[str, NDArray[Any]], str]:
    sha256 = hashlib.sha256()
    size = os.fstat(file.fileno()).st_size

    def take(count: int) -> bytes:
        if not 0 <= count <= size:
            raise ValueError("damaged")
        content = file.read(count)
        if len(content) != count:
            raise ValueError("cut short")
        sha256.update(content)
        return content

    length = int.from_bytes(take(_LENGTH_BYTES), "little")
    if length > _LONGEST_HEADER:
        raise ValueError("no header")
    about: dict[str, Any] = json.loads(take(length))
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in about["arrays"]:
        arrays[name] = np.frombuffer(take(math.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(shape)
    if file.read(_DIGEST_BYTES + 1) != sha256.digest():
        raise ValueError("damaged")
    return about, arrays, sha256.hexdigest()
