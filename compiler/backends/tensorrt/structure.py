"""The structure of an engine: its layers and kernels, recorded at build time, since loading an engine needs its GPU.

The layers are those of the strongly typed network, whose data types bind the compiler. The kernels come from the bytes
of the engine: engines of TensorRT's graph compiler contain their program as text, one operation a line with the layers
that it fuses. This is undocumented; where an engine has no such text, everything derived from it is None.
"""

import json
import mmap
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ATTENTION_KERNEL", "Program", "read_program", "write_structure"]

ATTENTION_KERNEL = "mha"
"""Part of the name of a kernel that computes attention without a score tensor (``_gemm_mha_v2``)."""

KERNELS = (b"function", b"runtime_function", b"runtime_fusion")
"""Operations that are compiled kernels, identified by name."""

PRODUCT = b"fully_connected"
LIBRARY = {PRODUCT: "gemm", b"corrltn": "convolution"}
"""Operations with a library kernel chosen at run time -> their kind."""

LINE = re.compile(rb"\n  (\w+) ?= ?\{ ([^\n]*)\}")
"""A line of the program: its kind and its fields."""

KERNEL = re.compile(rb'name="?([^" ]+)"? .*?layers="([^"]*)"')
LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
OUTPUT = re.compile(rb'output=\{"([^"]+)"')
TENSOR = re.compile(rb'name="([^"]+)".* type=(\w+)')
REGION = re.compile(rb"size=(\d+) .*place=accelerator")

MATMUL, DEQUANTIZE = "/MatMul_node", ".DequantizeLinear"
"""Parts of node names: a matrix product, and the dequantization that ``qie.compiler.quantization.qdq`` inserts."""

TRAITS = re.compile(rb"fmha::[A-Za-z]+_[a-z]*mma_([a-z0-9]+)(?:_\w+)?_traits")
"""The type of an attention kernel's operands in its source (``fmha::Ampere_hmma_bf16_traits``), which an engine of
TensorRT for RTX contains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """The program in the bytes of an engine.

    Attributes:
        kernels: (name, fused layers) of every kernel.
        products: type of the output, as the program names it (``bf16``, ``float``) -> number of matrix products with a
            library kernel.
        attention_types: types of the operands of the kernels that compute attention; empty where the engine does not
            contain their source.
        largest_buffer_bytes: size of the largest GPU buffer.
        allocations: tensors that every run allocates, because the workspace limit left no room for them.
    """

    kernels: tuple[tuple[str, tuple[str, ...]], ...]
    products: Mapping[str, int]
    attention_types: tuple[str, ...]
    largest_buffer_bytes: int
    allocations: int

    def fused(self) -> int:
        """The number of matrix products that share a kernel with the DequantizeLinear of their operands."""
        products = set()
        for name, layers in self.kernels:
            if name == LIBRARY[PRODUCT] and any(DEQUANTIZE in layer for layer in layers):
                products |= {layer for layer in layers if MATMUL in layer and DEQUANTIZE not in layer}
        return len(products)


def read_program(engine: Path) -> Program | None:
    """The program in the file ``engine``; None where it has none."""
    kernels: list[tuple[str, tuple[str, ...]]] = []
    outputs: list[bytes] = []
    types: dict[bytes, bytes] = {}
    buffers, allocations = [0], 0
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for kind, fields in (line.groups() for line in LINE.finditer(content)):
            if kind in (b"tensor", b"sub_tensor"):
                types |= TENSOR.findall(fields)
            elif kind == b"region":
                buffers += map(int, REGION.findall(fields))
            elif kind == b"allocate":
                allocations += 1
            elif (kind in KERNELS or kind in LIBRARY) and (found := KERNEL.match(fields)):
                name = found[1].decode() if kind in KERNELS else LIBRARY[kind]
                kernels.append((name, tuple(LAYER.findall(found[2].decode()))))
                if kind == PRODUCT:
                    outputs += OUTPUT.findall(fields)
        attention_types = {match[1].decode() for match in TRAITS.finditer(content)}
    if not kernels:
        return None
    return Program(
        kernels=tuple(kernels),
        products=Counter(types.get(output, b"unknown").decode() for output in outputs),
        attention_types=tuple(sorted(attention_types)),
        largest_buffer_bytes=max(buffers),
        allocations=allocations,
    )


def write_structure(layers: Sequence[Any], engine: Path, path: Path) -> Program | None:
    """Write the structure of ``engine`` to ``path`` as one JSON object; returns its program.

    Keys of the object:
        layers: rows of (name, type, outputs); an output is (dtype, dims), with -1 for a free dim.
        layer_types, layer_dtypes: number of layers per type, and per dtype of the first output.
        attention: number of attention layers, number of kernels that compute attention without a score tensor, and
            ``Program.attention_types``.
        kernels, products, largest_buffer_bytes, allocations: see ``Program``.
    """
    program = read_program(engine)
    types = Counter(kind for _, kind, _ in layers)
    fused = None if program is None else sum(ATTENTION_KERNEL in name for name, _ in program.kernels)
    content = {
        "layer_types": dict(types.most_common()),
        "layer_dtypes": dict(Counter(outputs[0][0] for _, _, outputs in layers if outputs).most_common()),
        "attention": {
            "layers": types["ATTENTION_OUTPUT"],
            "fused": fused,
            "types": () if program is None else program.attention_types,
        },
        "products": None if program is None else program.products,
        "largest_buffer_bytes": None if program is None else program.largest_buffer_bytes,
        "allocations": None if program is None else program.allocations,
        "kernels": None if program is None else program.kernels,
        "layers": layers,
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return program
