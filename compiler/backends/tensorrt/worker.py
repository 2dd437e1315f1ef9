"""The process that compiles one engine; ``qie.compiler.backends.tensorrt.builder`` starts it and reads its messages.

It reads a job, one JSON object, from stdin, and writes messages, one JSON object a line, to stdout. TensorRT and
TensorRT for RTX share one API; where they differ, the code tests for a name. It imports only the standard library and
the job's module, so that the peak memory of the process is the compiler's.

Messages: ``{"progress": n}`` in thousandths, never decreasing; then one of
``{"refused": [...]}``  the parser rejects the graph, with its errors,
``{"failed": [...]}``   the compiler built no engine, with the errors that it logged,
``{"disk": "..."}``     the engine could not be written,
``{"done": {...}}``     see ``compile_engine``.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["compile_engine"]

Tell = Callable[[Mapping[str, Any]], bool]
"""Sends a message; returns False once the reader is gone."""

ALL = 1000
"""Progress is in thousandths."""

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""

COMPILING = 700
"""Thousandths for the phases that TensorRT reports; the rest is writing the engine. With two blocks of the published
transformer, writing took half as long as the phases."""


def compile_engine(trt: Any, job: Mapping[str, Any], tell: Tell) -> None:
    """Compile an engine and report the result.

    Keys of the message "done":
        layers: rows of (name, type, outputs); an output is (dtype, dims), with -1 for a free dim.
        profiles: rows of (input, min, opt, max), read back from TensorRT.
        activation_bytes: as TensorRT logs it, or None.
        peak_bytes: peak memory of this process.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        job: an object with these keys.
            onnx, engine: paths of the graph and of the engine.
            weights_bytes: size of the graph's weights.
            profiles: rows of (input, min, opt, max).
            workspace_bytes: limit of the compiler's GPU workspace.
            compute_capability: like "8.9".
            weight_streaming: whether weights may stay in host memory at run time.
            timing_cache: a path or None.
        tell: sends a message.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        tell({"refused": [f"{e.node_operator()} {e.node_name()}: {e.desc()}".strip() for e in errors]})
        return
    layers = _layers(network)
    config = builder.create_builder_config()
    profile = _configure(trt, builder, config, job)
    progress = _Progress(job["weights_bytes"], tell)
    config.progress_monitor = _monitor(trt, progress)
    cache = _TimingCache(config, job["timing_cache"])
    try:
        written = _write_engine(trt, builder, network, config, Path(job["engine"]), progress)
    except OSError as problem:
        tell({"disk": problem.strerror or str(problem)})
        return
    if not written:
        tell({"failed": logger.errors})
        return
    cache.save()
    tell(
        {
            "done": {
                "layers": layers,
                "profiles": [[row[0], *([list(d) for d in profile.get_shape(row[0])])] for row in job["profiles"]],
                "activation_bytes": logger.activation_bytes,
                "peak_bytes": _peak_bytes(),
            }
        }
    )


def _configure(trt: Any, builder: Any, config: Any, job: Mapping[str, Any]) -> Any:
    """Set the options of the compiler; returns the optimization profile."""
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = 1
        name = "SM" + job["compute_capability"].replace(".", "")
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace_bytes"])
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a recipe means full precision
    if job["weight_streaming"] and hasattr(trt.BuilderFlag, "WEIGHT_STREAMING"):
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    elif hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # CUDA graphs need it; excluded by weight streaming
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10"):  # small shapes use less of the arena
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    profile = builder.create_optimization_profile()
    for name, *shapes in job["profiles"]:
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    return profile


def _write_engine(trt: Any, builder: Any, network: Any, config: Any, path: Path, progress: "_Progress") -> bool:
    """Build the engine into ``path``, streamed where TensorRT supports it; returns False where there is no engine."""
    with path.open("wb") as file:
        if hasattr(builder, "build_serialized_network_to_stream"):
            writer = _writer(trt, file, progress)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.problem is not None:
                raise writer.problem
        else:
            plan = builder.build_serialized_network(network, config)
            built = plan is not None
            if built:
                file.write(plan)
        file.flush()
        os.fsync(file.fileno())
        return bool(built) and file.tell() > 0


class _Progress:
    """One increasing number from the nested phases of TensorRT and the bytes written."""

    def __init__(self, weights_bytes: int, tell: Tell) -> None:
        self._phases: dict[str, tuple[str | None, int, int]] = {}
        self._expected = max(weights_bytes, 1)
        self._written = 0
        self._told = 0
        self._tell = tell
        self.continues = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        self._phases[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> bool:
        """Record a finished step; returns False once the reader of the messages is gone."""
        parent, steps, _ = self._phases[phase]
        self._phases[phase] = (parent, steps, step + 1)
        share = 0.0
        above: str | None = phase
        while above is not None and above in self._phases:
            parent, steps, done = self._phases[above]
            share = min((done + share) / steps, 1.0)
            above = parent
        return self._report(int(share * COMPILING))

    def write(self, count: int) -> bool:
        """Record written bytes; returns False once the reader of the messages is gone."""
        self._written += count
        share = min(self._written / self._expected, 1.0)
        return self._report(COMPILING + int(share * (ALL - COMPILING)))

    def _report(self, thousandths: int) -> bool:
        if thousandths > self._told:
            self._told = thousandths
            self.continues = self._tell({"progress": thousandths})
        return self.continues


def _monitor(trt: Any, progress: _Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _writer(trt: Any, file: Any, progress: _Progress) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Keeps the first error: TensorRT does not propagate exceptions."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.problem: OSError | None = None

        def write(self, data: bytes, *_: Any) -> int:
            if self.problem is not None:
                return 0
            try:
                file.write(data)
            except OSError as problem:
                self.problem = problem
                return 0
            progress.write(len(data))
            return len(data)

    return Writer()


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, and the activation memory, which TensorRT only logs."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.activation_bytes: int | None = None

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            elif activation := re.search(r"Total Activation Memory: (\d+) bytes", msg):
                self.activation_bytes = int(activation[1])

    return Logger()


class _TimingCache:
    """The timings of earlier builds, in the file ``path``; no cache where ``path`` is None."""

    def __init__(self, config: Any, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None:
            timings = self._path.read_bytes() if self._path.is_file() else b""
            self._cache = config.create_timing_cache(timings)
            config.set_timing_cache(self._cache, ignore_mismatch=False)

    def save(self) -> None:
        if self._path is not None:
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(self._cache.serialize())
            temporary.replace(self._path)


def _layers(network: Any) -> list[Any]:
    rows = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        typed = [(str(o.dtype).rpartition(".")[2], _dims(o.shape)) for o in outputs if o is not None]
        rows.append((layer.name, str(layer.type).rpartition(".")[2], typed))
    return rows


def _dims(shape: Any) -> list[int]:
    """The dims of a tensor; empty where TensorRT does not know its rank."""
    try:
        return [int(d) for d in shape]
    except ValueError:
        return []


def _peak_bytes() -> int:
    """Peak memory of this process, from the kernel, since getrusage starts at the peak of the parent."""
    try:
        peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        peak = None
    return int(peak[1]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _end_with_parent() -> None:
    """Let Linux kill this process when the thread that started it ends (prctl(2)); elsewhere its next message fails."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Read a job and compile it. Other output on stdout goes to stderr, so that it cannot break a message."""
    _end_with_parent()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as messages:
        os.dup2(2, 1)
        job = json.load(sys.stdin)
        if os.getppid() != job["parent"]:
            return  # it ended before the kernel was told

        def tell(message: Mapping[str, Any]) -> bool:
            try:
                messages.write(json.dumps(message) + "\n")
                messages.flush()
            except OSError:
                return False
            return True

        try:
            compile_engine(import_module(job["module"]), job, tell)
        except MemoryError:
            tell({"failed": ["the process is out of memory"]})


if __name__ == "__main__":
    main()
