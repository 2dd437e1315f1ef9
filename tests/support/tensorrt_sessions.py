"""TensorRT sessions on a fake GPU: single runs, onnxruntime's results for the same inputs, and a denoising loop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import Component, EngineRecord, TensorSpec
from qie.engines.bundle.sealed import seal
from qie.engines.sessions.device import Device
from qie.engines.sessions.load import load
from qie.engines.sessions.tensorrt.session import TensorRtSession

Arrays = dict[str, NDArray[Any]]
DECODER = {"batch": 1, "rows": 4, "columns": 6}
TRANSFORMER = {
    "batch": 1, "noise_tokens": 16, "reference_tokens": 20, "text_tokens": 9, "tokens": 45,
    "steps": 4, "steps_of_blocks": 8,
}  # fmt: skip


def record_of(folder: Path, component: Component) -> EngineRecord:
    (record,) = [e for e in open_bundle(str(folder)).manifest.engines if e.component == component]
    return record


def session_of(folder: Path, component: Component, device: Device) -> TensorRtSession:
    session = load(folder, record_of(folder, component), device)
    assert isinstance(session, TensorRtSession)
    return session


def change_file(folder: Path, component: Component, **values: Any) -> EngineRecord:
    """Change the fake engine's description; its record in the manifest stays."""
    path = folder / f"{component}.engine"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return record_of_any_size(folder, component)


def record_of_any_size(folder: Path, component: Component) -> EngineRecord:
    manifest = json.loads((folder / "manifest.json").read_text())
    for engine in manifest["engines"]:
        for file in engine["files"]:
            file["bytes"] = (folder / file["path"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    return record_of(folder, component)


def values(specs: tuple[TensorSpec, ...], sizes: dict[str, int], seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        s.name: generator.random(s.shape(sizes)).astype(np.float32)
        if s.dtype == "float32"
        else generator.integers(0, 4, s.shape(sizes)).astype(s.dtype)
        for s in specs
    }


def run(session: Any, arrays: Arrays, sizes: dict[str, int], outputs: tuple[TensorSpec, ...]) -> Arrays:
    results = {spec.name: session.empty(spec.name, sizes) for spec in outputs}
    session.run({name: session.upload(array) for name, array in arrays.items()}, results)
    return {name: session.download(tensor) for name, tensor in results.items()}


def on_cpu(bundle: Path, component: Component, arrays: Arrays, sizes: dict[str, int]) -> Arrays:
    record = record_of(bundle, component)
    return run(load(bundle, record), arrays, sizes, record.outputs)


def same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


class Loop:
    """A transformer that is run with the same tensors again and again, as the denoising loop does."""

    def __init__(self, folder: Path, device: Device, sizes: dict[str, int] = TRANSFORMER) -> None:
        self.record = record_of(folder, "transformer")
        self.session = session_of(folder, "transformer", device)
        self.sizes = sizes
        self.arrays = values(self.record.inputs, sizes)
        self.inputs = {name: self.session.upload(array) for name, array in self.arrays.items()}
        self.outputs = {s.name: self.session.empty(s.name, sizes) for s in self.record.outputs}

    def run(self) -> None:
        self.session.run(self.inputs, self.outputs)

    def results(self) -> Arrays:
        return {name: self.session.download(tensor) for name, tensor in self.outputs.items()}

    def close(self) -> None:
        self.session.close()
        self.inputs.clear()
        self.outputs.clear()
