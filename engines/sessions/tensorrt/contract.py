"""The contract of an engine: inputs, outputs and profiles that the manifest names and the file must have."""

from pathlib import Path
from typing import Any

from qie.engines.bundle.manifest import EngineRecord, TensorSpec
from qie.engines.errors import BundleError

__all__ = ["DTYPES", "Shape", "check_contract", "matches", "profile_ranges", "shape_text", "within"]

DTYPES = {"FLOAT": "float32", "INT64": "int64", "UINT8": "uint8"}
"""TensorRT's names of the manifest's dtypes."""

Shape = tuple[int, ...]


def check_contract(trt: Any, engine: Any, record: EngineRecord, path: Path) -> None:
    """Check that the engine of the file ``path`` has the manifest's inputs and outputs.

    TensorRT may know fewer of an output's dims.

    Raises:
        BundleError: it has others.
    """
    actual = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dims = tuple(engine.get_tensor_shape(name))
        mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
        place = "" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else " on the host"
        dtype = engine.get_tensor_dtype(name).name
        shown = shape_text(dims) if mode == "input" else f"of {len(dims)} dims"
        actual[name] = f"{mode} {DTYPES.get(dtype, dtype)} {shown}{place}"
    expected = {
        spec.name: f"input {spec.dtype} {shape_text([-1 if isinstance(d, str) else d for d in spec.dims])}"
        for spec in record.inputs
    } | {spec.name: f"output {spec.dtype} of {len(spec.dims)} dims" for spec in record.outputs}
    for name in {**expected, **actual}:
        if actual.get(name) != expected.get(name):
            raise BundleError(
                f"{path} has {name} as {actual.get(name, 'nothing')}, expected "
                f"{expected.get(name, 'nothing')}; build the bundle again with `qie build`"
            )


def profile_ranges(engine: Any, record: EngineRecord, profile: int) -> dict[str, tuple[Shape, Shape]]:
    """The smallest and largest shape of every input with free dims."""
    ranges = {}
    for spec in record.inputs:
        if any(isinstance(dim, str) for dim in spec.dims):
            low, _, high = engine.get_tensor_profile_shape(spec.name, profile)
            ranges[spec.name] = (tuple(low), tuple(high))
    return ranges


def within(shape: Shape, low: Shape, high: Shape) -> bool:
    """Whether every dim of ``shape`` lies within its limits."""
    return len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


def matches(shape: Shape, spec: TensorSpec) -> bool:
    """Whether ``shape`` has the fixed dims of ``spec``."""
    dims = spec.dims
    return len(shape) == len(dims) and all(isinstance(d, str) or d == n for d, n in zip(dims, shape, strict=True))


def shape_text(shape: Any) -> str:
    """A shape for a person to read, such as ``1x3x64``."""
    return "x".join(str(dim) for dim in shape) or "one number"
