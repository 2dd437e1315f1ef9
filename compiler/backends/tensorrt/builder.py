"""Builds engines for TensorRT and TensorRT for RTX, each in a process of its own.

TensorRT for RTX compiles for a named compute capability on any machine, TensorRT for the GPU that it runs on. The
process (``qie.compiler.backends.tensorrt.worker``) gives every build its own logger and its own peak of memory, and one
that the system kills for memory takes nothing with it.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from qie.compiler.backends.tensorrt import worker as tensorrt_worker
from qie.compiler.backends.tensorrt.datatypes import check_datatypes
from qie.compiler.backends.tensorrt.structure import Program, write_structure
from qie.compiler.recipe.schema import Recipe
from qie.engines.backends import BACKENDS, Backend
from qie.engines.bundle.manifest import EngineRecord, FileRecord, GraphRecord, ProfileRecord, QuantizationRecord
from qie.engines.errors import BuildError
from qie.engines.files import qie_home, sha256_of
from qie.engines.machine import this_machine

__all__ = ["TensorRT"]

GIB = 2**30

STREAMED_SHARE = 0.75
"""An engine whose weights take a larger share of the card's memory is built so that they may stay in host memory:
activations, inputs and outputs need their room too."""

WORKER = Path(tensorrt_worker.__file__)

SHOWN = 3
"""How many of the compiler's messages an error shows."""

OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|could not find any implementation|insufficient (memory|workspace)|requested size",
    re.IGNORECASE,
)
"""What TensorRT says when memory is what it lacks; "could not find any implementation" is one of these ways."""


@dataclass(frozen=True, slots=True)
class TensorRT:
    """The builder for ``backend``, a row of ``BACKENDS``."""

    backend: str

    @property
    def facts(self) -> Backend:
        """The backend's row."""
        return BACKENDS[self.backend]

    def version(self) -> str:
        """Version of the installed module."""
        return str(import_module(self.facts.build_module).__version__)

    def unavailable(self, recipe: Recipe) -> str | None:
        """Why this machine cannot build for the recipe's GPU, and what to do about it; None where it can."""
        install = self.facts.build_install
        if find_spec(self.facts.build_module) is None:
            return f"{self.backend} is not installed; run `{install}`"
        try:
            trt = import_module(self.facts.build_module)
        except (ImportError, OSError) as problem:
            return f"{self.backend} is installed and does not load ({problem}); run `{install}`"
        wanted = recipe.compute_capability
        if self.facts.builds_on_gpu:
            found = [gpu.compute_capability for gpu in this_machine().gpus]
            if wanted in found:
                return None
            here = f"its GPUs have {', '.join(found)}" if found else "it has no GPU"
            return (
                f"{self.backend} builds for the GPU at hand, and this machine has none of compute capability {wanted} "
                f"({here}); build there"
            )
        if wanted is None or not hasattr(trt.ComputeCapability, _name(wanted)):
            return f"{self.backend} {self.version()} does not compile for compute capability {wanted}"
        return None

    def build(
        self,
        graph: GraphRecord,
        folder: Path,
        *,
        key: str,
        recipe: Recipe,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> EngineRecord:
        """Compile ``graph``, whose files lie in ``folder``, into the same folder.

        ``progress`` is called with rising thousandths. The record's profiles are read back from TensorRT.

        Raises:
            RecipeError: the recipe's GPU lacks a data type of the graph; the compiler is not called.
            BuildError: TensorRT refuses the graph or makes no engine of it, memory or the disk is full.
        """
        start = time.perf_counter()
        check_datatypes(onnx.load(folder / graph.path, load_external_data=False), graph.component, recipe)
        stem = f"{graph.component}.{self.backend}-{recipe.compute_capability}"
        engine = folder / f"{stem}.engine"
        weights_bytes = sum(file.bytes for file in graph.files if file.path != graph.path)
        job = {
            "module": self.facts.build_module,
            "onnx": str(folder / graph.path),
            "engine": str(engine),
            "weights_bytes": weights_bytes,
            "profiles": [[p.input, p.min, p.opt, p.max] for p in graph.profiles],
            "workspace_bytes": int(recipe.limits.build_workspace_gib * GIB),
            "compute_capability": recipe.compute_capability,
            "weight_streaming": weights_bytes > STREAMED_SHARE * recipe.memory_gib * GIB,
            "timing_cache": str(self._timing_cache(recipe)) if self.facts.builds_on_gpu else None,
        }
        found = self._compile(job, graph, recipe, progress)
        structure = folder / f"{stem}.json"
        program = write_structure(found["layers"], engine, structure)
        _check_codes(found["layers"], graph)
        return EngineRecord(
            component=graph.component,
            backend=self.backend,
            compute_capability=str(recipe.compute_capability),
            backend_version=self.version(),
            precision=graph.precision,
            key=key,
            path=engine.name,
            files=(_record(engine),),
            inputs=graph.inputs,
            outputs=graph.outputs,
            parameters=graph.parameters,
            quantization=_with_fused(graph.quantization, program),
            build_seconds=round(time.perf_counter() - start, 3),
            build_peak_bytes=found["peak_bytes"],
            profiles=tuple(
                ProfileRecord(input=name, min=tuple(low), opt=tuple(tuned), max=tuple(high))
                for name, low, tuned, high in found["profiles"]
            ),
            activation_bytes=found["activation_bytes"],
            structure=_record(structure),
        )

    def _timing_cache(self, recipe: Recipe) -> Path:
        """Where TensorRT's measurements of this GPU lie, which hold for GPUs of its name and for its own version."""
        gpu = this_machine().gpus[_gpu_index(recipe)]
        path = qie_home() / "timing" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower())}-{self.version()}.cache"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _environment(self, recipe: Recipe) -> dict[str, str]:
        """Where several GPUs are at hand and nobody chose one, the worker sees the first that the recipe is for."""
        chosen = {}
        if self.facts.builds_on_gpu and "CUDA_VISIBLE_DEVICES" not in os.environ:
            chosen = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(_gpu_index(recipe))}
        return {**os.environ, **chosen}

    def _compile(
        self, job: Mapping[str, Any], graph: GraphRecord, recipe: Recipe, progress: Callable[[int, int], None]
    ) -> Mapping[str, Any]:
        """What the worker found out about the engine that it wrote."""
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            with subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=self._environment(recipe),
            ) as process:
                try:
                    last = _listen(process, job, progress)
                except BaseException:
                    process.kill()
                    raise
            log.seek(0)
            said = log.read().strip().splitlines()[-SHOWN:]
        if "done" in last:
            found: Mapping[str, Any] = last["done"]
            return found
        if "disk" in last:
            raise BuildError(f"{job['engine']} cannot be written ({last['disk']}): make room, or build elsewhere")
        if "refused" in last:
            raise BuildError(
                f"{self.backend} {self.version()} does not take the graph of {graph.component}: "
                f"{'; '.join(last['refused'][:SHOWN])}"
            )
        errors = last.get("failed", said)
        if process.returncode == -signal.SIGKILL:
            errors = ["the system killed the process"]
        if any(OUT_OF_MEMORY.search(error) for error in errors) or process.returncode == -signal.SIGKILL:
            raise BuildError(self._out_of_memory(job, graph, recipe, errors))
        raise BuildError(
            f"{self.backend} {self.version()} made no engine of {graph.component}: "
            f"{'; '.join(errors) or f'it ended {_ending(process.returncode)} and said nothing'}"
        )

    def _out_of_memory(self, job: Mapping[str, Any], graph: GraphRecord, recipe: Recipe, errors: list[str]) -> str:
        limits = recipe.limits
        return (
            f"memory ran out while {self.backend} compiled {graph.component} ({errors[0]}): its weights are "
            f"{job['weights_bytes'] / GIB:.1f} GiB, and the recipe for {recipe.gpu} has limits.build_workspace_gib = "
            f"{limits.build_workspace_gib:g} and limits.host_memory_gib = {limits.host_memory_gib:g}; build on a "
            "machine with more memory, or in a recipe of your own raise the first or lower shapes.batch.max"
        )


def _listen(
    process: "subprocess.Popen[str]", job: Mapping[str, Any], progress: Callable[[int, int], None]
) -> Mapping[str, Any]:
    """Give the worker its job and pass its progress on; returns its last message, empty where it said nothing."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it is gone: what it left behind says why
        process.stdin.write(json.dumps(job))
        process.stdin.close()
    last: Mapping[str, Any] = {}
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # it was killed in the middle of a word
        last = json.loads(line)
        if "progress" in last:
            progress(last["progress"], tensorrt_worker.ALL)
    return last


CODES = ("FP8", "INT8", "INT4")
"""TensorRT's names of what quantized weights are."""


def _check_codes(layers: Sequence[Any], graph: GraphRecord) -> None:
    """See that TensorRT holds as many weights as codes as the graph has.

    Raises:
        BuildError: it widened some of them.
    """
    if graph.quantization is None:
        return
    held = sum(kind == "CONSTANT" and bool(made) and made[0][0] in CODES for _, kind, made in layers)
    wanted = graph.quantization.quantized
    if held != wanted:
        raise BuildError(
            f"the engine of {graph.component} holds {held} quantized weights, its graph {wanted}: this version of "
            'TensorRT is not one that qie knows how to quantize for; set scheme to "none" in the recipe'
        )


def _with_fused(record: QuantizationRecord | None, program: Program | None) -> QuantizationRecord | None:
    return record if record is None or program is None else replace(record, fused=program.fused())


def _ending(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"


def _gpu_index(recipe: Recipe) -> int:
    """The place of the first GPU that the recipe is for, in the order of ``nvidia-smi``, which is that of the bus."""
    return [gpu.compute_capability for gpu in this_machine().gpus].index(str(recipe.compute_capability))


def _name(compute_capability: str) -> str:
    """As TensorRT for RTX names it: "8.9" is SM89."""
    return "SM" + compute_capability.replace(".", "")


def _record(path: Path) -> FileRecord:
    return FileRecord(path=path.name, bytes=path.stat().st_size, sha256=sha256_of(path))
