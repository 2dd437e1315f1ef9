"""The memory that an engine compiler reserves for intermediate tensors, from the kernels into which it fuses a graph.

The rules are read from the programs that engines of TensorRT for RTX 1.7.1 for 8.0 and 8.9 contain: they list every
kernel, the buffers that it reads and writes, and the memory regions of these (docs/tensorrt.md, "Memory of a run").

Kernels:

- Each product (MatMul, Gemm, Conv), Attention and Resize is a kernel. Products of one tensor by several weights, such
  as queries, keys and values, are one product with one output.
- An Add, Gelu or Mul behind a product is part of it if its operands are weights or tensors of the product's own size
  that are there before, which a Where is not. This does not hold for one of several products and for a quantized one.
- All other nodes are fused with each other unless a product lies between. A tensor is written if a product reads it, or
  a kernel behind a later product. A Where is computed again wherever it is read, unless a product reads it.
- A norm that a Concat reads is a kernel of its own. RMSNormalization writes its result, LayerNormalization the centered
  input in float32.
- A ReduceMean ends a kernel, which also writes the Slices of the tensor whose mean square it is.
- Attention's output has the heads before the tokens; if a product reads it, a copy puts the tokens first. A bool mask
  is copied in the dtype of the operands, by a kernel that may run as early as behind the attention before.
- The operands of an attention are computed at the same time, on several streams: what they are computed from stays
  until all of them are there.

Memory:

- The compiler does not know the sizes, so a tensor gets a whole region while it lives. Tensors are assigned from the
  largest to the smallest, among equals from the last kernel to the first, each to the first region without a tensor
  that lives at the same time. A region is as large as the largest of its tensors. The sum of the regions is the memory.
- Every product has a workspace, which gets a region like a tensor.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from qie.compiler.planning.shapes import VIEWS, Tensor, body_of, tensors_of

__all__ = ["reserved_bytes"]

PRODUCTS = ("MatMul", "Gemm", "Conv")
KERNELS = (*PRODUCTS, "Attention", "Resize", "Loop")
"""Operations that are not fused with what they read."""

EPILOGUE = ("Add", "Gelu", "Mul")
"""Operations that may become part of the product that they read."""

WORKSPACE = 8_192_000
"""Bytes of a product's workspace, the same in every engine (``__scratch_space`` in the program)."""


@dataclass(eq=False, slots=True)
class _Buffer:
    """Memory that kernels need.

    Attributes:
        bytes: its size.
        born, dies: numbers of the first and of the last kernel that needs it.
    """

    bytes: int
    born: int
    dies: int


def reserved_bytes(graph: onnx.GraphProto) -> int:
    """The activation memory of an engine of ``graph``, in bytes; the shapes of the graph are all known."""
    return sum(_regions(_Kernels(graph).buffers))


def _regions(buffers: Iterable[_Buffer]) -> list[int]:
    """Sizes of the regions, in bytes."""
    regions: list[list[_Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, -b.born)):
        for region in regions:
            if all(buffer.dies < other.born or other.dies < buffer.born for other in region):
                region.append(buffer)
                break
        else:
            regions.append([buffer])
    return [region[0].bytes for region in regions]


class _Kernels:
    """The kernels of a graph one after the other. "Storage" is a tensor's name, for views that of what they view.

    Attributes:
        buffers: what they write, and their workspaces.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.buffers: list[_Buffer] = []
        self._tensors = tensors_of(graph, {})
        self._weights = {t.name for t in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._count = 0
        self._attended = -1  # the last attention
        self._sources: dict[str, frozenset[_Buffer]] = {}  # storage -> the written tensors that it is computed from
        self._unfinished: set[str] = set()  # outputs of products whose kernel goes on
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        self._levels: dict[str, int] = {}  # storage -> the longest chain of kernels before it
        self._together: dict[str, list[onnx.NodeProto]] = defaultdict(list)  # storage -> its products by weights
        nodes = list(_unrolled(graph, self._tensors))
        for node in nodes:
            for name in self._storages(node.input):
                self._readers[name].append(node)
            for name in self._storages(node.output):
                self._makers[name] = node
                self._levels[name] = self._level(node) + (node.op_type in KERNELS)
            if node.op_type == "MatMul" and self._storages(node.input)[1] in self._weights:
                self._together[self._storages(node.input)[0]].append(node)
        self._reduced = {self._squared(node) for node in nodes if node.op_type == "ReduceMean"}
        for node in self._ordered(nodes):
            self._add(node)

    def _storages(self, names: Iterable[str]) -> list[str]:
        return [self._tensors[name].storage for name in names if name]

    def _squared(self, node: onnx.NodeProto) -> str:
        """What ``node``, a ReduceMean, takes the mean square of."""
        name = self._storages(node.input)[0]
        while name in self._makers and self._makers[name].op_type in ("Pow", "Cast"):
            name = self._storages(self._makers[name].input)[0]
        return name

    def _level(self, node: onnx.NodeProto) -> int:
        return max((self._levels.get(name, 0) for name in self._storages(node.input)), default=0)

    def _several(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The products that are one with ``node``, which is among them; empty where there is no other."""
        products = self._together.get(self._storages(node.input)[0], []) if node.op_type == "MatMul" else []
        return products if len(products) > 1 and node in products else ()

    def _ordered(self, nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        """The nodes, every one directly behind the last product that it depends on."""
        place: dict[str, int] = {}
        places = []
        for number, node in enumerate(nodes):
            several = self._several(node)
            if several and node is not several[0]:
                here = place[self._storages(several[0].output)[0]]
            elif node.op_type in KERNELS:
                here = number
            else:
                here = max((place.get(name, -1) for name in self._storages(node.input)), default=-1)
            places.append(here)
            place |= dict.fromkeys(self._storages(node.output), here)
        return (nodes[i] for i in sorted(range(len(nodes)), key=places.__getitem__))

    def _needs(self, names: Iterable[str]) -> frozenset[_Buffer]:
        """The written tensors that ``names`` are computed from."""
        return frozenset(buffer for name in self._storages(names) for buffer in self._sources.get(name, ()))

    def _run(self, needs: Iterable[_Buffer], *, workspace: int = 0, writes: int = 0) -> frozenset[_Buffer]:
        """Add a kernel; returns the buffer of ``writes`` bytes that it writes."""
        for buffer in needs:
            buffer.dies = self._count
        written = _Buffer(writes, self._count, self._count)
        self.buffers += [written] if writes else []
        self.buffers += [_Buffer(workspace, self._count, self._count)] if workspace else []
        self._count += 1
        return frozenset((written,))

    def _write(self, name: str, needs: Iterable[_Buffer], *, size: int | None = None, workspace: int = 0) -> None:
        """Add a kernel that writes ``name``, which is ``size`` bytes if not its own size."""
        size = self._tensors[name].bytes if size is None else size
        self._sources[name] = self._run(needs, workspace=workspace, writes=0 if name in self._outputs else size)

    def _add(self, node: onnx.NodeProto) -> None:
        needs = self._needs(node.input)
        name = self._storages(node.output)[0]
        several = self._several(node)
        if several:
            if node is several[0]:
                size = sum(self._tensors[each.output[0]].bytes for each in several)
                self._write(name, needs, size=size, workspace=WORKSPACE)
            self._sources[name] = self._sources[self._storages(several[0].output)[0]]
        elif node.op_type in PRODUCTS or any(name in self._unfinished for name in self._storages(node.input)):
            if self._continues(node, name):
                self._unfinished.add(name)
                self._sources[name] = needs
            else:
                self._write(name, needs, workspace=WORKSPACE)
        elif node.op_type == "Attention":
            self._attend(node, name, needs)
        elif node.op_type == "Loop":
            body = [name for inner in body_of(node).node for name in (*inner.input, *inner.output)]
            self._write(name, self._needs(body))
        else:
            for name in self._storages(node.output):
                self._fuse(node, name, needs)

    def _continues(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether the kernel of a product goes on behind ``node``, which writes ``name``."""
        if len(self._readers[name]) != 1 or self._readers[name][0].op_type not in EPILOGUE or name in self._outputs:
            return False
        if any(self._tensors[each].dtype.bitwidth <= 8 for each in node.input if each):
            return False
        size = self._tensors[name].bytes
        others = [each for each in self._storages(self._readers[name][0].input) if each != name]
        return all(
            each in self._weights
            or (self._tensors[each].bytes == size and (each not in self._makers or self._is_there(each)))
            for each in others
        )

    def _is_there(self, name: str) -> bool:
        """Whether ``name`` was computed before, and is not computed again where it is read."""
        return name in self._sources and self._makers[name].op_type != "Where"

    def _attend(self, node: onnx.NodeProto, name: str, needs: frozenset[_Buffer]) -> None:
        for buffer in self._prologue(node):
            buffer.dies = max(buffer.dies, self._count - 1)
        if len(node.input) > 3 and node.input[3]:
            mask, operand = self._tensors[node.input[3]], self._tensors[node.input[0]]
            size = mask.bytes * operand.dtype.bitwidth // mask.dtype.bitwidth
            earliest = self._count if self._attended < 0 else self._attended + 1
            self.buffers.append(_Buffer(size, earliest, self._count))
        self._attended = self._count
        self._write(name, needs)
        if any(reader.op_type in PRODUCTS for reader in self._readers[name]):
            self._write(name, self._sources[name])

    def _prologue(self, attention: onnx.NodeProto) -> Iterator[_Buffer]:
        """What is written between an attention and the products before it, whose outputs are included."""
        found: set[str] = set()
        remaining = self._storages(attention.input)
        while remaining:
            name = remaining.pop()
            if name not in found:
                found.add(name)
                yield from self._sources.get(name, ())
                if self._levels.get(name, 0) > 0 and self._makers[name].op_type not in KERNELS:
                    remaining += self._storages(self._makers[name].input)

    def _fuse(self, node: onnx.NodeProto, name: str, needs: frozenset[_Buffer]) -> None:
        readers = self._readers[name]
        again = node.op_type == "Where" and not any(reader.op_type in KERNELS for reader in readers)
        stacked = any(reader.op_type == "Concat" for reader in readers)
        behind = any(reader.op_type in KERNELS or self._level(reader) > self._levels[name] for reader in readers)
        sliced = node.op_type == "Slice" and self._storages(node.input)[0] in self._reduced
        if node.op_type == "ReduceMean" or sliced:
            self._write(name, needs)
        elif stacked and node.op_type == "LayerNormalization":
            self._write(name, needs, size=4 * self._tensors[name].bytes * 8 // self._tensors[name].dtype.bitwidth)
        elif name in self._outputs or (stacked and node.op_type == "RMSNormalization") or (behind and not again):
            self._write(name, needs)
        else:
            self._sources[name] = needs


def _unrolled(graph: onnx.GraphProto, tensors: dict[str, Tensor]) -> Iterator[onnx.NodeProto]:
    """The nodes but for views; those of a loop's body once, before the loop. Adds the body's tensors to ``tensors``."""
    for node in graph.node:
        if node.op_type == "Loop":
            tensors |= tensors_of(body_of(node), tensors)
            yield from _unrolled(body_of(node), tensors)
        if node.op_type not in VIEWS:
            yield node
