"""What an engine is made of, written down when it is built, because an engine cannot be opened without its device.

The layers are those of the strongly typed network: their data types are what the compiler is bound to. The kernels are
read from the engine's own bytes: engines made by TensorRT's graph compiler carry their program as text, one operation a
line with the layers that went into it. Where an engine carries none (nothing promises that it does), what depends on
it is None.
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
"""Operations that are a kernel of the compiler's own, by its name."""

LIBRARY = {b"fully_connected": "gemm", b"corrltn": "convolution"}
"""Operations whose kernel is chosen at run time, and what they are."""

OPERATION = re.compile(rb'\n  (\w+)=\{ name="?([^" ]+)"? [^\n]*?layers="([^"]*)"')
REGION = re.compile(rb"\n  region = \{ name=\S+ size=(\d+) [^\n]*place=accelerator")
PRODUCT, DEQUANTIZE = "/MatMul_node", ".DequantizeLinear"
"""Parts of the names of a graph's nodes: a product, and what ``qie.compiler.quantization.qdq`` puts before it."""

LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What an engine's bytes say: ``kernels`` as (name, layers in it), bytes of the largest buffer on the device, and
    how many tensors are allocated anew in every run because the compiler's workspace had no room for them."""

    kernels: tuple[tuple[str, tuple[str, ...]], ...]
    largest_buffer_bytes: int
    allocations: int

    def fused(self) -> int:
        """Products that a kernel computes together with the DequantizeLinear of what it multiplies."""
        found = set()
        for name, layers in self.kernels:
            if name == LIBRARY[b"fully_connected"] and any(DEQUANTIZE in layer for layer in layers):
                found |= {layer for layer in layers if PRODUCT in layer and DEQUANTIZE not in layer}
        return len(found)


def read_program(engine: Path) -> Program | None:
    """The program in the file ``engine``, None where there is none."""
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
    """Write the structure of ``engine`` to ``path``, one JSON object, and return its program.

    ``layers``: rows of (name, type, outputs), an output being (dtype, dims) with -1 for a free dim;
    ``layer_types``, ``layer_dtypes``: how many of each, a layer's dtype being its first output's;
    ``attention``: attention layers of the network, and kernels that compute attention without a score tensor;
    ``kernels``: rows of (name, layers); ``largest_buffer_bytes``, ``allocations``: see ``Program``.
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
