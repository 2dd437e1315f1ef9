"""The description of an engine, which cannot be opened without its GPU: how many layers and kernels it has."""

import json
from dataclasses import dataclass
from typing import Annotated

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BundleError, first_line
from qie.engines.records import Range, from_plain

__all__ = ["Structure", "read_structure"]

_Number = Annotated[int, Range(0, 1 << 53)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """The counts of an engine's description.

    Attributes:
        layers: of the network.
        attention: of them that compute attention.
        kernels: compiled kernels; None where the backend does not report them, as for the rest.
        fused: kernels that compute attention without a score tensor.
        fused_types: types in which they compute, as in their source (``bf16``); empty where the engine lacks it.
        largest_buffer_bytes: size of the largest GPU buffer.
        allocations: tensors that every run allocates.
    """

    layers: _Number
    attention: _Number
    kernels: _Number | None
    fused: _Number | None
    fused_types: tuple[str, ...]
    largest_buffer_bytes: _Number | None
    allocations: _Number | None


def read_structure(bundle: Bundle, engine: EngineRecord) -> Structure:
    """The counts in the description of ``engine``, which has one.

    Raises:
        BundleError: the file is damaged.
    """
    assert engine.structure is not None
    name = engine.structure.path
    try:
        data = json.loads(bundle.folder.read(lambda folder: (folder / name).read_bytes()))
        kernels = data["kernels"]
        counts = {
            "layers": len(data["layers"]),
            "attention": data["attention"]["layers"],
            "kernels": None if kernels is None else len(kernels),
            "fused": data["attention"]["fused"],
            "fused_types": data["attention"].get("types", []),
            "largest_buffer_bytes": data["largest_buffer_bytes"],
            "allocations": data["allocations"],
        }
        return from_plain(Structure, counts)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as problem:
        raise BundleError(
            f"{bundle.path / name} is no description of an engine ({first_line(problem)}); build the bundle again with "
            "`qie build`"
        ) from None
