"""The weight stream against the disk: ``python -m bench.stream [--gib 2] [--folder DIR]``.

Tensors of the published widths, with random values, are written as one file of bfloat16, and then streamed into a file
of external data: copied, with the matrices transposed as graphs have them, quantized, or widened. Each is compared with
its floor, measured right before: the time that reading the same bytes and a plain write of the bytes out takes. The
file is read from the disk, not from what the kernel has cached of it, and what is written is forced onto the disk, both
times. Each kind runs in a process of its own, whose peak memory is that of the stream. The folder needs about three
times ``--gib``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.report import argument_parser, environment, write_report
from bench.stages import forget, peak_bytes, plain_read, plain_write
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.schema import SchemeName
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weight import Layout, Weight
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.terminal import human_bytes, table

WIDTH, WIDE, TABLE = 3072, 12288, (152064, 3584)
"""Of the published transformer, and the table of the published language model."""

QUANTIZED: dict[str, SchemeName] = {"fp8": "fp8", "int8": "int8-smooth", "int4": "w4a16"}
KINDS = {"copy": 3.0, **dict.fromkeys(QUANTIZED, 6.0), "float32": 3.0}
"""What is made of the tensors -> the most times its floor that it may take."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--gib", type=float, default=2, help="GiB of bfloat16 to stream, default: 2")
    parser.add_argument("--folder", type=Path, help="where to write, default: a temporary folder")
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of these, the default")
    parser.add_argument("--table", action="store_true", help="with the table of the language model, of 1.09 GB")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FILE"), help="stream FILE in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]))))
        return
    rows, figures = [], {}
    with TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "model.safetensors"
        write_tensors(file, int(options.gib * 2**30), with_table=options.table)
        for kind in options.kinds.split(","):
            command = [sys.executable, "-m", "bench.stream", "--one", kind, str(file)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            found["ratio"], found["bar"] = found["seconds"] / found["floor_seconds"], KINDS[kind]
            figures[kind] = found
            rows.append(
                [
                    kind,
                    human_bytes(found["bytes_in"]),
                    human_bytes(found["bytes_out"]),
                    f"{found['floor_seconds']:.1f} s",
                    f"{found['seconds']:.1f} s",
                    f"{human_bytes(int(found['bytes_in'] / found['seconds']))}/s",
                    f"{found['ratio']:.2f} (at most {KINDS[kind]:.0f})",
                    f"{found['cpu_seconds']:.1f} s",
                    human_bytes(found["peak_bytes"]),
                ]
            )
    header = ["kind", "read", "written", "floor", "stream", "of input", "ratio", "CPU", "peak memory"]
    print(table(rows, header=header, right=range(1, len(header))))
    print(environment()["cpu"])
    write_report(options, {"kinds": figures})


def shapes(size: int, *, with_table: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of about ``size`` bytes: the linears, norms and biases of blocks, and a table."""
    left = size // 2
    if with_table:
        yield "table.weight", TABLE
        left -= TABLE[0] * TABLE[1]
    number = 0
    while left > 0:
        for name, shape in {
            "q.weight": (WIDTH, WIDTH),
            "q.bias": (WIDTH,),
            "norm.weight": (128,),
            "up.weight": (WIDE, WIDTH),
            "up.bias": (WIDE,),
            "down.weight": (WIDTH, WIDE),
        }.items():
            yield f"blocks.{number}.{name}", shape
            left -= int(np.prod(shape))
        number += 1


def write_tensors(path: Path, size: int, *, with_table: bool) -> None:
    """Write a safetensors file of normal values with the deviation 0.02."""
    pool = (np.random.default_rng(0).standard_normal(1 << 24, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    values = pool.astype(np.uint16)
    header, end = {}, 0
    for name, shape in shapes(size, with_table=with_table):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            left = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 2
            while left > 0:
                file.write(values[:left].data)
                left -= values.size
        file.flush()
        os.fsync(file.fileno())


def measure(kind: str, file: Path) -> dict[str, Any]:
    """Stream ``file``, after its floor."""
    reader = open_file(file)
    weights = [one for name in reader.names() for one in made_of(name, reader.shape(name), kind)]
    target = file.with_name(kind)
    bytes_in = file.stat().st_size
    bytes_out = total_bytes(weights)
    floor = floor_seconds(file, target, bytes_out)
    forget(file)
    cpu, start = time.process_time(), time.perf_counter()
    written = write_weights(weights, {"transformer": reader}, target)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    target.unlink()
    return {
        "bytes_in": bytes_in,
        "bytes_out": written.bytes,
        "floor_seconds": floor,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": peak_bytes(),
    }


def made_of(name: str, shape: tuple[int, ...], kind: str) -> Iterator[Weight]:
    """The weights of a graph that are made of a tensor."""
    is_matrix = len(shape) == 2 and not name.startswith("table")
    dtype: Any = "float32" if kind == "float32" else "bfloat16"
    if not is_matrix:
        yield Weight(name=name, subfolder="transformer", shape=shape, dtype=dtype)
        return
    turned = shape[::-1]
    layout: tuple[Layout, ...] = ("transpose",)
    if kind in ("copy", "float32"):
        yield Weight(name=name, subfolder="transformer", shape=turned, dtype=dtype, layout=layout)
        return
    quantizer = SCHEMES[QUANTIZED[kind]].weights
    common: dict[str, Any] = {"subfolder": "transformer", "layout": layout, "quantizer": quantizer}
    yield Weight(name=name, shape=turned, dtype=quantizer.dtype, **common)
    yield Weight(name=f"{name}.scales", shape=quantizer.scale_shape(turned), dtype="float32", scale_of=name, **common)


def floor_seconds(file: Path, target: Path, bytes_out: int) -> float:
    """Seconds to read ``file``, and then to write ``bytes_out`` bytes."""
    seconds = plain_read(file) + plain_write(target, bytes_out)
    target.unlink()
    return seconds


if __name__ == "__main__":
    main()
