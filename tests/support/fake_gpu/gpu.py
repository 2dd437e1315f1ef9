"""A fake GPU in the place of a real one: what a test installs, and bundles for it."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.engines import backends, gpus
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import EngineRecord, FileRecord, GraphRecord, ProfileRecord
from qie.engines.bundle.sealed import write_manifest
from qie.engines.files import sha256_of
from tests.support.fake_gpu.cuda import runtime
from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.tensorrt import tensorrt
from tests.support.libcuda import Libcuda, StandIn

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
SHAPES = {"layers": (1, 64), "rows": (1, 64), "columns": (1, 64), "height": (16, 1024), "width": (16, 1024)}
"""Range of a free dim by its name; others are 1 to 4096, but for the batch (``batches``)."""


def batches(component: str) -> tuple[int, int]:
    """As in ``qie.compiler.planning.profiles``: the transformer alone takes several at once."""
    return (1, 4) if component == "transformer" else (1, 1)


class Gpu(Device):
    """One fake GPU."""

    def libcuda(self) -> Libcuda:
        """The driver's library for this GPU."""
        visible = [StandIn(name="Fake L40S", capability=self.capability, bytes=self.memory_bytes)] * self.count
        major, minor = self.cuda.split(".")
        return Libcuda(visible, cuda=int(major) * 1000 + int(minor) * 10)

    def install(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        """Put this GPU and the modules of the backends ``names`` in the place of the real ones."""
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime(self))
        for backend in names:
            monkeypatch.setitem(sys.modules, MODULES[backend], tensorrt(self, MODULES[backend], backend))
        monkeypatch.setattr(gpus, "libcuda", self.libcuda)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        installed = {"cuda.bindings", "onnxruntime", *(MODULES[b] for b in names)}
        monkeypatch.setattr(backends, "installed", installed.__contains__)

    def retarget(self, bundle: Path, folder: Path, backend: str, **changes: Any) -> Path:
        """A copy of a CPU bundle whose engines are built for this GPU; ``changes`` go into the manifest's defaults."""
        shutil.copytree(bundle, folder)
        manifest = open_bundle(str(bundle)).manifest
        engines = tuple(self._engine(folder, record, backend) for record in manifest.engines)
        defaults = replace(manifest.defaults, **changes)
        write_manifest(replace(manifest, engines=engines, defaults=defaults), folder)
        return folder

    def _engine(self, folder: Path, record: EngineRecord, backend: str) -> EngineRecord:
        ranges = SHAPES | {"batch": batches(record.component)}
        profiles = tuple(
            ProfileRecord(
                input=spec.name,
                **{
                    which: tuple(ranges.get(d, (1, 4096))[index] if isinstance(d, str) else d for d in spec.dims)
                    for which, index in (("min", 0), ("opt", 0), ("max", 1))
                },
            )
            for spec in record.inputs
            if any(isinstance(dim, str) for dim in spec.dims)
        )
        path = folder / f"{Path(record.path).stem}.engine"
        path.write_text(self.content(record, folder / record.path, backend, profiles))
        file = FileRecord(path=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
        return replace(
            record,
            backend=backend,
            compute_capability=self.capability,
            backend_version=self.version,
            path=path.name,
            files=(file, *record.files),
            profiles=profiles,
        )

    def content(
        self, record: EngineRecord | GraphRecord, onnx: Path, backend: str, profiles: tuple[ProfileRecord, ...]
    ) -> str:
        """The file of an engine that executes the graph ``onnx`` of ``record``."""
        content = {
            "fake": MODULES[backend],
            "version": self.version,
            "capability": self.capability,
            "component": record.component,
            "onnx": str(onnx),
            "weights": sum(file.bytes for file in record.files),
            "inputs": [[s.name, s.dtype, [-1 if isinstance(d, str) else d for d in s.dims]] for s in record.inputs],
            "outputs": [[s.name, s.dtype, [-1 if isinstance(d, str) else d for d in s.dims]] for s in record.outputs],
            "profiles": [{p.input: [p.min, p.opt, p.max] for p in profiles}],
        }
        return json.dumps(content)
