"""The builder for TensorRT and TensorRT for RTX, which compiles each engine in a separate process.

TensorRT for RTX compiles for any compute capability on any machine, TensorRT for a GPU of this machine. The process
(``qie.compiler.backends.tensorrt.worker``) gives every build its own logger and its own peak memory; if the system
kills it for lack of memory, the builder survives.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from qie.compiler.backends.failures import OUT_OF_MEMORY, SHOWN, ending
from qie.compiler.backends.local_gpu import no_local_gpu
from qie.compiler.backends.tensorrt import worker as tensorrt_worker
from qie.compiler.backends.tensorrt.datatypes import check_datatypes
from qie.compiler.backends.tensorrt.structure import Program, write_structure
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import BACKENDS, Backend
from qie.engines.bundle.manifest import EngineRecord, GraphRecord, ProfileRecord, QuantizationRecord, file_record
from qie.engines.errors import BuildError
from qie.engines.files import qie_home
from qie.engines.gpus import Gpu
from qie.engines.machine import GIB, choose_gpu, this_machine
from qie.engines.progress import StageProgress, no_progress

__all__ = ["TensorRT"]

STREAMED_SHARE = 0.75
"""An engine whose weights exceed this share of GPU memory is built with weight streaming, so that they may stay in host
memory: activations, inputs and outputs need GPU memory too."""

WORKER = Path(tensorrt_worker.__file__)


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The builder of one backend.

    Attributes:
        backend: name of the backend, a key of ``BACKENDS``.
    """

    backend: str

    @property
    def facts(self) -> Backend:
        """The row of the backend in ``BACKENDS``."""
        return BACKENDS[self.backend]

    def version(self) -> str:
        """The version of the installed module."""
        return str(import_module(self.facts.build_module).__version__)

    def unavailable(self, recipe: Recipe, device: int | None = None) -> str | None:
        """Why this machine, or its GPU ``device``, cannot build for the recipe's GPU, a semicolon, and the fix."""
        install = self.facts.build_install
        if find_spec(self.facts.build_module) is None:
            return f"{self.backend} is not installed; run `{install}`"
        try:
            trt = import_module(self.facts.build_module)
        except (ImportError, OSError) as problem:
            return f"{self.backend} is installed but does not load ({problem}); run `{install}`"
        capability = recipe.compute_capability
        if self.facts.builds_on_gpu:
            return no_local_gpu(self.backend, recipe, device)
        if capability is None or not hasattr(trt.ComputeCapability, _sm_name(capability)):
            return (
                f"{self.backend} {self.version()} does not compile for compute capability {capability}; set other "
                "backends in the recipe"
            )
        return None

    def build(
        self,
        graph: GraphRecord,
        folder: Path,
        *,
        key: str,
        recipe: Recipe,
        device: int | None = None,
        progress: StageProgress = no_progress,
    ) -> EngineRecord:
        """Compile ``graph`` into an engine (``Builder.build``), whose profiles are read back from TensorRT.

        Raises:
            EngineMismatchError: it takes the GPU, and there is none any more.
            RecipeError: the recipe's GPU lacks a data type of the graph; the compiler does not start.
            BuildError: TensorRT rejects the graph or builds no engine, or memory or disk space ran out.
        """
        start = time.perf_counter()
        gpu = self._gpu(recipe, device)
        check_datatypes(onnx.load(folder / graph.path, load_external_data=False), graph.component, recipe)
        stem = f"{Path(graph.path).stem}.{self.backend}-{recipe.compute_capability}"
        engine = folder / f"{stem}.engine"
        weights_bytes = sum(file.bytes for file in graph.files if file.path != graph.path)
        job = {
            "module": self.facts.build_module,
            "parent": os.getpid(),
            "onnx": str(folder / graph.path),
            "engine": str(engine),
            "weights_bytes": weights_bytes,
            "profiles": [[p.input, p.min, p.opt, p.max] for p in graph.profiles],
            "workspace_bytes": int(recipe.limits.build_workspace_gib * GIB),
            "compute_capability": recipe.compute_capability,
            "weight_streaming": weights_bytes > STREAMED_SHARE * recipe.memory_gib * GIB,
            "timing_cache": None if gpu is None else str(self._timing_cache(gpu)),
        }
        result = self._compile(job, graph, recipe, gpu, progress)
        structure = folder / f"{stem}.json"
        program = write_structure(result["layers"], engine, structure)
        _check_quantized(result["layers"], graph)
        return EngineRecord(
            component=graph.component,
            backend=self.backend,
            compute_capability=str(recipe.compute_capability),
            backend_version=self.version(),
            precision=graph.precision,
            key=key,
            path=engine.name,
            files=(file_record(folder, engine.name),),
            inputs=graph.inputs,
            outputs=graph.outputs,
            parameters=graph.parameters,
            quantization=_with_fused(graph.quantization, program),
            build_seconds=round(time.perf_counter() - start, 3),
            build_peak_bytes=result["peak_bytes"],
            profiles=tuple(
                ProfileRecord(input=name, min=tuple(smallest), opt=tuple(typical), max=tuple(largest))
                for name, smallest, typical, largest in result["profiles"]
            ),
            activation_bytes=result["activation_bytes"],
            structure=file_record(folder, structure.name),
            part=graph.part,
        )

    def _gpu(self, recipe: Recipe, device: int | None) -> Gpu | None:
        """The GPU that engines are built on; None where building needs none."""
        return choose_gpu(this_machine(), str(recipe.compute_capability), device) if self.facts.builds_on_gpu else None

    def _timing_cache(self, gpu: Gpu) -> Path:
        """The file of TensorRT's timings, which hold for one GPU model and one version of TensorRT."""
        path = qie_home() / "timing" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower())}-{self.version()}.cache"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _compile(
        self, job: Mapping[str, Any], graph: GraphRecord, recipe: Recipe, gpu: Gpu | None, progress: StageProgress
    ) -> Mapping[str, Any]:
        """Run the worker, which sees ``gpu`` alone; returns its message "done" (``worker.compile_engine``).

        Raises:
            BuildError: see ``build``.
        """
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            with subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid},
            ) as process:
                try:
                    last = _listen(process, job, progress)
                except BaseException:
                    process.kill()
                    raise
            log.seek(0)
            stderr = log.read().strip().splitlines()[-SHOWN:]
        if "done" in last:
            result: Mapping[str, Any] = last["done"]
            return result
        if "disk" in last:
            raise BuildError(
                f"{job['engine']} cannot be written ({last['disk']}); free some space or build in another folder"
            )
        if "refused" in last:
            raise BuildError(
                f"{self.backend} {self.version()} rejects the graph of {graph.component} "
                f"({', '.join(last['refused'][:SHOWN])}); set another backend for it in the recipe"
            )
        errors = last.get("failed", stderr)
        if process.returncode == -signal.SIGKILL:
            errors = ["the system killed the process"]
        if any(OUT_OF_MEMORY.search(error) for error in errors) or process.returncode == -signal.SIGKILL:
            raise BuildError(self._out_of_memory(job, graph, recipe, errors))
        reason = ", ".join(errors) or f"it ended {ending(process.returncode)} without a message"
        raise BuildError(
            f"{self.backend} {self.version()} built no engine of {graph.component} ({reason}); set another backend for "
            "it in the recipe"
        )

    def _out_of_memory(self, job: Mapping[str, Any], graph: GraphRecord, recipe: Recipe, errors: list[str]) -> str:
        limits = recipe.limits
        return (
            f"memory ran out while {self.backend} compiled {graph.component} ({errors[0]}), whose weights take "
            f"{job['weights_bytes'] / GIB:.1f} GiB, and the recipe for {recipe.gpu} has limits.build_workspace_gib = "
            f"{limits.build_workspace_gib:g}; build on a machine with more memory or in more parts, or raise the limit "
            "or lower shapes.batch.max in your own recipe"
        )


def _listen(process: "subprocess.Popen[str]", job: Mapping[str, Any], progress: StageProgress) -> Mapping[str, Any]:
    """Send the job to the worker and forward its progress; returns its last message, empty where there is none."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the worker ended: its log and exit code tell why
        process.stdin.write(json.dumps(job))
        process.stdin.close()
    last: Mapping[str, Any] = {}
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # the worker was killed while it wrote
        last = json.loads(line)
        if "progress" in last:
            progress(last["progress"], tensorrt_worker.ALL)
    return last


QUANTIZED_DTYPES = ("FP8", "INT8", "INT4")
"""TensorRT's names of the dtypes of quantized weights."""


def _check_quantized(layers: Sequence[Any], graph: GraphRecord) -> None:
    """Check that all quantized weights of the graph are quantized in the engine.

    Raises:
        BuildError: TensorRT stores some of them in a wider dtype.
    """
    if graph.quantization is None:
        return
    quantized = sum(
        kind == "CONSTANT" and bool(outputs) and outputs[0][0] in QUANTIZED_DTYPES for _, kind, outputs in layers
    )
    expected = graph.quantization.quantized
    if quantized != expected:
        raise BuildError(
            f"the engine of {graph.component} has {quantized} quantized weights, expected {expected} as in its graph; "
            'use another version of TensorRT, or set the scheme of the component to "none" in the recipe'
        )


def _with_fused(record: QuantizationRecord | None, program: Program | None) -> QuantizationRecord | None:
    return record if record is None or program is None else replace(record, fused=program.fused())


def _sm_name(compute_capability: str) -> str:
    """TensorRT's name of a compute capability: "8.9" is SM89."""
    return "SM" + compute_capability.replace(".", "")
