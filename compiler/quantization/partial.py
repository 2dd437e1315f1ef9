"""How far a calibration has come, in one file that is replaced after every block: a stopped one continues from it.

The file is the length of a header, the header in JSON, the arrays it names one after the other, and the sha256 of all
that. What does not have its sha256, or is of another calibration, counts as absent.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qie.compiler.quantization.blockwise import Values
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
        found: component -> statistics of its linears so far.
    """

    component: Component
    segments: int
    samples: Sequence[Values]
    found: Mapping[str, Found]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialCalibration:
    """The file of one calibration.

    Attributes:
        path: the file.
        key: digest of everything that decides the result.
    """

    path: Path
    key: str

    def write(self, reached: Reached) -> None:
        """Replace the file; one that cannot be written is not worth a failure."""
        with suppress(OSError):
            self._write(reached)

    def _write(self, reached: Reached) -> None:
        arrays = dict(_arrays(reached))
        about = {
            "key": self.key,
            "component": reached.component,
            "segments": reached.segments,
            "samples": len(reached.samples),
            "components": list(reached.found),
            "alphas": {component: found.alphas for component, found in reached.found.items()},
            "arrays": [[name, values.dtype.name, list(values.shape)] for name, values in arrays.items()],
        }
        header = json.dumps(about).encode()
        sha256 = hashlib.sha256()
        with replacing(self.path) as temporary, temporary.open("wb") as file:
            for part in (len(header).to_bytes(_LENGTH_BYTES, "little"), header, *arrays.values()):
                content = (
                    part if isinstance(part, bytes) else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
                )
                sha256.update(content)
                file.write(content)
            file.write(sha256.digest())

    def read(self) -> Reached | None:
        """What the file says; None where there is none, or a damaged one, or one of another calibration."""
        try:
            with self.path.open("rb") as file:
                return self._parse(file)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    def _parse(self, file: BinaryIO) -> Reached:
        sha256 = hashlib.sha256()

        def take(count: int) -> bytes:
            content = file.read(count)
            if len(content) != count:
                raise ValueError("cut short")
            sha256.update(content)
            return content

        length = int.from_bytes(take(_LENGTH_BYTES), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("no header")
        about: dict[str, Any] = json.loads(take(length))
        if about["key"] != self.key:
            raise ValueError("another calibration")
        found = {component: Found(alphas=about["alphas"][component]) for component in about["components"]}
        samples: list[Values] = [{} for _ in range(about["samples"])]
        for name, dtype, shape in about["arrays"]:
            count = math.prod(shape) * np.dtype(dtype).itemsize
            values: NDArray[Any] = np.frombuffer(take(count), dtype).reshape(shape)
            owner, kind, rest = name.split("/", 2)
            if owner == "sample":
                samples[int(kind)][rest] = values
            elif kind == "amax":
                found[owner].amax[rest] = values
            else:
                scheme, group = rest.split("/", 1)
                found[owner].smoothing_scales.setdefault(scheme, {})[group] = values
        digest = sha256.digest()
        if file.read(_DIGEST_BYTES + 1) != digest:
            raise ValueError("damaged")
        return Reached(component=about["component"], segments=about["segments"], samples=samples, found=found)


def _arrays(reached: Reached) -> Iterator[tuple[str, NDArray[Any]]]:
    for number, sample in enumerate(reached.samples):
        yield from ((f"sample/{number}/{name}", values) for name, values in sample.items())
    for component, found in reached.found.items():
        yield from ((f"{component}/amax/{name}", values) for name, values in found.amax.items())
        for scheme, scales in found.smoothing_scales.items():
            yield from ((f"{component}/smoothing/{scheme}/{group}", values) for group, values in scales.items())
