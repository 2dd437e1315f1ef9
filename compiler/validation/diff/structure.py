"""What differs between the descriptions of two engines: layers, their precisions, kernels.

Layers are compared by their name without the running numbers that the exporter and the ONNX parser append, because a
node that is inserted shifts all numbers after it.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from qie.compiler.validation.diff.changes import Change, changes
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BundleError, first_line
from qie.engines.records import Range, from_plain

__all__ = ["Description", "LayerChange", "StructureDiff", "diff_structures", "read_description", "without_numbers"]

_Number = Annotated[int, Range(0, 1 << 53)]
_Dim = Annotated[int, Range(-1, 1 << 53)]

Layer = tuple[str, str, tuple[tuple[str, tuple[_Dim, ...]], ...]]
"""Name, type, and (dtype, dims) of each output."""

Kernel = tuple[str, tuple[str, ...]]
"""Name, and names of the layers that it fuses."""

NUMBERS = re.compile(r"_node_\d+|(?<=\w)(_\d+)+$|(?<=Layer\* )\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    layers: _Number
    fused: _Number | None
    types: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The description of an engine as the builder wrote it (``write_structure``); None is what no backend reported.

    Attributes:
        layers: of the network.
        layer_types, layer_dtypes: number of layers per type, and per dtype of the first output.
        attention: layers that compute attention, and kernels that do so without a score tensor.
        kernels: compiled kernels.
        products: dtype of the output -> number of matrix products with a library kernel.
        largest_buffer_bytes: size of the largest GPU buffer.
        allocations: tensors that every run allocates.
    """

    layers: tuple[Layer, ...]
    layer_types: dict[str, _Number]
    layer_dtypes: dict[str, _Number]
    attention: _Attention
    kernels: tuple[Kernel, ...] | None
    products: dict[str, _Number] | None
    largest_buffer_bytes: _Number | None
    allocations: _Number | None

    def counts(self) -> dict[str, Any]:
        """Every count by its name."""
        return {
            "layers": len(self.layers),
            "kernels": None if self.kernels is None else len(self.kernels),
            "attention layers": self.attention.layers,
            "fused attention": self.attention.fused,
            "types of fused attention": ", ".join(self.attention.types) or None,
            **{f"layers with {dtype} output": count for dtype, count in self.layer_dtypes.items()},
            **{f"library products in {dtype}": count for dtype, count in (self.products or {}).items()},
            "largest buffer, bytes": self.largest_buffer_bytes,
            "run-time allocations": self.allocations,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerChange:
    """Layers of one name and type that were added, removed or have outputs of another precision.

    Attributes:
        kind: what happened to them.
        name: without running numbers.
        type: of the layer, such as ``MATRIX_MULTIPLY``.
        old, new: dtypes of the outputs, such as ``BF16``; None for a layer that is not there.
        count: number of such layers.
    """

    kind: Literal["added", "removed", "precision"]
    name: str
    type: str
    old: str | None
    new: str | None
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureDiff:
    """What differs between two descriptions.

    Attributes:
        counts: of layers, kernels, attention, types and memory.
        layers: added, removed or of another precision.
        kernels: name -> number of kernels of that name, for those whose number differs.
    """

    counts: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    kernels: tuple[Change, ...]

    @property
    def differs(self) -> bool:
        """Whether there is any difference."""
        return bool(self.counts or self.layers or self.kernels)


def read_description(bundle: Bundle, engine: EngineRecord) -> Description:
    """The description of ``engine``, which has one.

    Raises:
        BundleError: the file is damaged.
    """
    assert engine.structure is not None
    name = engine.structure.path
    try:
        data = json.loads(bundle.folder.read(lambda folder: (folder / name).read_bytes()))
        return from_plain(Description, data)
    except (OSError, ValueError, RecursionError) as problem:
        raise BundleError(
            f"{bundle.path / name} is no description of an engine ({first_line(problem)}); build the bundle again with "
            "`qie build`"
        ) from None


def diff_structures(old: Description, new: Description) -> StructureDiff:
    """What differs between two descriptions of engines of one component."""
    layers: list[LayerChange] = []
    by_name_old, by_name_new = _by_name(old), _by_name(new)
    for name in dict.fromkeys((*by_name_old, *by_name_new)):
        before, after = by_name_old.get(name, Counter()), by_name_new.get(name, Counter())
        layers += _layer_changes(name, before - after, after - before)
    return StructureDiff(
        counts=changes(old.counts(), new.counts()),
        layers=tuple(layers),
        kernels=changes(_kernels(old), _kernels(new)),
    )


def without_numbers(name: str) -> str:
    """The name of a layer without running numbers; numbers of blocks, which follow a dot, stay."""
    return NUMBERS.sub("", name)


def _by_name(description: Description) -> dict[str, Counter[tuple[str, str]]]:
    """The (type, precision) of all layers of a name."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for name, kind, outputs in description.layers:
        precision = ", ".join(dict.fromkeys(dtype for dtype, _ in outputs)) or "-"
        found.setdefault(without_numbers(name), Counter())[kind, precision] += 1
    return found


def _layer_changes(name: str, gone: Counter[tuple[str, str]], come: Counter[tuple[str, str]]) -> list[LayerChange]:
    """Layers of one type that went and came are the same ones in another precision, as far as their numbers go."""
    found = []
    for (kind, old), number in gone.items():
        left = number
        for other, new in list(come):
            if other == kind and (count := min(left, come[other, new])):
                found.append(LayerChange(kind="precision", name=name, type=kind, old=old, new=new, count=count))
                come[other, new] -= count
                left -= count
        if left:
            found.append(LayerChange(kind="removed", name=name, type=kind, old=old, new=None, count=left))
    for (kind, new), number in come.items():
        if number:
            found.append(LayerChange(kind="added", name=name, type=kind, old=None, new=new, count=number))
    return found


def _kernels(description: Description) -> dict[str, int]:
    return dict(Counter(name for name, _ in description.kernels or ()))
