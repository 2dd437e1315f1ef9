"""The structure of an engine: its layers and kernels, recorded at build time, since loading an engine needs its GPU.

The layers are those of the strongly typed network, whose data types bind the compiler. The kernels come from the bytes
of the engine: engines of TensorRT's graph compiler contain their program as text, one operation a line with the layers
that it fuses. This is undocumented; where an engine has no such text, everything derived from it is None.
"""

import json
import mmap
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ATTENTION_KERNEL", "Program", "read_program", "write_structure"]

ATTENTION_KERNEL = "mha"
"""Part of the name of a kernel that computes attention without a score tensor (``_gemm_mha_v2``)."""

KERNELS = (b"function", b"runtime_function", b"runtime_fusion")
"""Operations that are compiled kernels, identified by name."""

LIBRARY = {b"fully_connected": "gemm", b"corrltn": "convolution"}
"""Operations with a library kernel chosen at run time -> their kind."""

OPERATION = re.compile(rb'\n  (\w+)=\{ name="?([^" ]+)"? [^\n]*?layers="([^"]*)"')
REGION = re.compile(rb"\n  region = \{ name=\S+ size=(\d+) [^\n]*place=accelerator")
PRODUCT, DEQUANTIZE = "/MatMul_node", ".DequantizeLinear"
"""Parts of node names: a matrix product, and the dequantization that ``qie.compiler.quantization.qdq`` inserts."""

LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """The program in the bytes of an engine.

    Attributes:
        kernels: (name, fused layers) of every kernel.
        largest_buffer_bytes: size of the largest GPU buffer.
        allocations: tensors that every run allocates, because the workspace limit left no room for them.
    """

    kernels: tuple[tuple[str, tuple[str, ...]], ...]
    largest_buffer_bytes: int
    allocations: int

    def fused(self) -> int:
        """The number of matrix products that share a kernel with the DequantizeLinear of their operands."""
        products = set()
        for name, layers in self.kernels:
            if name == LIBRARY[b"fully_connected"] and any(DEQUANTIZE in layer for layer in layers):
                products |= {layer for layer in layers if PRODUCT in layer and DEQUANTIZE not in layer}
        return len(products)


def read_program(engine: Path) -> Program | None:
    """The program in the file ``engine``; None where it has none."""
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        operations = [(m[1], m[2], m[3]) for m in OPERATION.finditer(content)]
        buffers = [int(m[1]) for m in REGION.finditer(content)]
    if not operations:
        return None
    kernels = [
        (name.decode() if kind in KERNELS else LIBRARY[kind], tuple(LAYER.findall(layers.decode())))
        for kind, name, layers in operations
        if kind in KERNELS or kind in LIBRARY
    ]
    return Program(
        kernels=tuple(kernels),
        largest_buffer_bytes=max(buffers, default=0),
        allocations=sum(kind == b"allocate" for kind, _, _ in operations),
    )


def write_structure(layers: Sequence[Any], engine: Path, path: Path) -> Program | None:
    """Write the structure of ``engine`` to ``path`` as one JSON object; returns its program.

    Keys of the object:
        layers: rows of (name, type, outputs); an output is (dtype, dims), with -1 for a free dim.
        layer_types, layer_dtypes: number of layers per type, and per dtype of the first output.
        attention: number of attention layers, and of kernels that compute attention without a score tensor.
        kernels, largest_buffer_bytes, allocations: see ``Program``.
    """
    program = read_program(engine)
    types = Counter(kind for _, kind, _ in layers)
    fused = None if program is None else sum(ATTENTION_KERNEL in name for name, _ in program.kernels)
    content = {
        "layer_types": dict(types.most_common()),
        "layer_dtypes": dict(Counter(outputs[0][0] for _, _, outputs in layers if outputs).most_common()),
        "attention": {"layers": types["ATTENTION_OUTPUT"], "fused": fused},
        "largest_buffer_bytes": None if program is None else program.largest_buffer_bytes,
        "allocations": None if program is None else program.allocations,
        "kernels": None if program is None else program.kernels,
        "layers": layers,
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return program
