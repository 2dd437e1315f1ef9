"""The contract of an engine: inputs, outputs and profiles that the manifest names and the file must have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qie.engines.bundle.manifest import EngineRecord, TensorSpec
from qie.engines.errors import BundleError

__all__ = ["DTYPES", "NUMPY_DTYPES", "Shape", "check_contract", "matches", "profile_ranges", "shape_text", "within"]

DTYPES = {"FLOAT": "float32", "BF16": "bfloat16", "INT64": "int64", "UINT8": "uint8"}
"""TensorRT's names of the manifest's dtypes."""

NUMPY_DTYPES = {"float32": "float32", "bfloat16": "uint16", "int64": "int64", "uint8": "uint8"}
"""NumPy's names of the manifest's dtypes: it has no bfloat16, so that is held as its bits."""

Shape = tuple[int, ...]


def check_contract(trt: Any, engine: Any, record: EngineRecord, path: Path) -> dict[str, str]:
    """Check that the engine of the file ``path`` has the manifest's inputs and outputs; returns what it has, by name.

    An input's free dim is -1 in the engine, or a number where every profile fixes it to that number
    (NvInferRuntime.h, ``IExecutionContext::getTensorShape``: "implicitly constrained to be a single value"). TensorRT
    may know fewer of an output's dims.

    Raises:
        BundleError: it has others.
    """
    expected = {spec.name: ("input", spec) for spec in record.inputs}
    expected |= {spec.name: ("output", spec) for spec in record.outputs}
    actual = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for name in [*expected, *sorted(actual - expected.keys())]:
        found = _found(trt, engine, name) if name in actual else "nothing"
        mode, spec = expected.get(name, ("", None))
        fixed = _fixed(engine, spec) if spec is not None and mode == "input" and found.startswith(mode) else {}
        wanted = "nothing" if spec is None else _wanted(mode, spec, fixed)
        if found != wanted:
            raise BundleError(
                f"{path} has {name} as {found}, expected {wanted}; build the bundle again with `qie build`"
            )
    return {name: _found(trt, engine, name) for name in expected}


def _found(trt: Any, engine: Any, name: str) -> str:
    dims = tuple(engine.get_tensor_shape(name))
    mode = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
    place = "" if engine.get_tensor_location(name) == trt.TensorLocation.DEVICE else " on the host"
    dtype = engine.get_tensor_dtype(name).name
    shown = shape_text(dims) if mode == "input" else f"of {len(dims)} dims"
    return f"{mode} {DTYPES.get(dtype, dtype)} {shown}{place}"


def _wanted(mode: str, spec: TensorSpec, fixed: Mapping[int, int]) -> str:
    dims = [fixed.get(place, -1) if isinstance(dim, str) else dim for place, dim in enumerate(spec.dims)]
    return f"{mode} {spec.dtype} {shape_text(dims) if mode == 'input' else f'of {len(dims)} dims'}"


def _fixed(engine: Any, spec: TensorSpec) -> dict[int, int]:
    """Place and size of the free dims of ``spec`` for which the engine has a number that every profile allows alone."""
    dims = tuple(engine.get_tensor_shape(spec.name))
    fixed = {}
    for place, dim in enumerate(spec.dims):
        if isinstance(dim, str) and len(dims) == len(spec.dims) and dims[place] != -1:
            ranges = [engine.get_tensor_profile_shape(spec.name, p) for p in range(engine.num_optimization_profiles)]
            ends = {tuple(shape)[place] for low, _, high in ranges for shape in (low, high)}
            if ends == {dims[place]}:
                fixed[place] = dims[place]
    return fixed


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
