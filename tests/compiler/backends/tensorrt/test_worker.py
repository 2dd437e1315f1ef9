"""The calls of TensorRT's API, against a stand-in that lacks the names that only TensorRT for RTX has."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qie.compiler.backends.tensorrt import worker
from qie.compiler.backends.tensorrt.worker import compile_engine


class StandIn:
    """Records its calls. Other tests cover the API that both share with the real TensorRT for RTX."""

    def __init__(self, plan: bytes | None = b"plan", errors: tuple[str, ...] = ()) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.plan, self.errors = plan, errors
        self.NetworkDefinitionCreationFlag = SimpleNamespace()
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.BuilderFlag = SimpleNamespace(
            TF32="tf32", WEIGHT_STREAMING="streaming", REQUIRE_USER_ALLOCATION="user allocation"
        )
        self.PreviewFeature = SimpleNamespace(RUNTIME_ACTIVATION_RESIZE_10_10="resize")
        self.ILogger = type("ILogger", (), {"ERROR": "error", "INTERNAL_ERROR": "internal"})
        self.IProgressMonitor = type("IProgressMonitor", (), {})

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace if name.startswith("__") else self._part(name)

    def _part(self, name: str) -> Any:
        if name == "Builder":
            return self._builder
        if name == "OnnxParser":
            return lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True)
        raise AttributeError(name)

    def _builder(self, logger: Any) -> Any:
        profile = SimpleNamespace(
            set_shape=lambda *a: self.calls.append(("shape", *a)), get_shape=lambda name: [(1,), (2,), (3,)]
        )
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_layers=self.calls.append(("network", flags)) or 0),
            create_builder_config=self._config,
            create_optimization_profile=lambda: profile,
            build_serialized_network=lambda network, config: self._build(logger, config),
        )

    def _config(self) -> Any:
        note = self.calls.append
        return SimpleNamespace(
            set_memory_pool_limit=lambda *a: note(("limit", *a)),
            set_flag=lambda flag: note(("set", flag)),
            set_preview_feature=lambda feature, on: note(("preview", feature, on)),
            clear_flag=lambda flag: note(("clear", flag)),
            add_optimization_profile=lambda profile: note(("profile",)),
            create_timing_cache=lambda timings: (
                note(("cache", timings)) or SimpleNamespace(serialize=lambda: timings + b"+")
            ),
            set_timing_cache=lambda cache, ignore_mismatch: note(("use cache", ignore_mismatch)),
        )

    def _build(self, logger: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("all", None, 2)
        monitor.phase_start("half", "all", 4)
        for step in range(4):
            if not monitor.step_complete("half", step):
                return None
        monitor.phase_finish("half")
        monitor.step_complete("all", 0)
        monitor.phase_start("half", "all", 4)  # progress does not decrease
        monitor.step_complete("half", 0)
        for error in self.errors:
            logger.log(self.ILogger.ERROR, error)  # type: ignore[attr-defined]
        logger.log("info", "Total Activation Memory: 12345 bytes")
        flags = ("streaming", "user allocation")
        if all(("set", flag) in self.calls for flag in flags):  # as TensorRT for RTX 1.7.1 does
            logger.log("error", "kREQUIRE_USER_ALLOCATION is not compatible with kWEIGHT_STREAMING")
            return None
        return self.plan


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return {
        "onnx": "graph.onnx",
        "engine": str(tmp_path / "engine"),
        "weights_bytes": 100,
        "profiles": [["x", [1], [2], [3]]],
        "workspace_bytes": 7 * 2**30,
        "compute_capability": "8.0",
        "weight_streaming": True,
        "timing_cache": str(tmp_path / "cache"),
    }


def messages_of(trt: Any, job: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    compile_engine(trt, job, lambda message: messages.append(dict(message)) or True)  # type: ignore[func-returns-value]
    return messages


def test_the_job_decides_the_options_of_the_compiler(job: dict[str, Any]) -> None:
    stand_in = StandIn()
    messages = messages_of(stand_in, job)
    assert ("limit", "workspace", 7 * 2**30) in stand_in.calls
    assert ("set", "streaming") in stand_in.calls
    assert ("clear", "tf32") in stand_in.calls
    assert ("preview", "resize", True) in stand_in.calls
    assert ("shape", "x", [1], [2], [3]) in stand_in.calls
    assert ("network", 0) in stand_in.calls  # every network is strongly typed
    done = messages[-1]["done"]
    assert done["profiles"] == [["x", [1], [2], [3]]]
    assert done["activation_bytes"] == 12345
    assert Path(job["engine"]).read_bytes() == b"plan"
    rising = [m["progress"] for m in messages[:-1]]
    assert rising == sorted(set(rising))
    assert rising[0] == 700 // 8  # a quarter of a half
    stand_in = StandIn()
    messages_of(stand_in, {**job, "weight_streaming": False})
    assert ("set", "streaming") not in stand_in.calls
    assert ("set", "user allocation") in stand_in.calls


def test_the_timing_cache_grows(job: dict[str, Any]) -> None:
    for timings in (b"", b"+", b"++"):
        stand_in = StandIn()
        messages_of(stand_in, job)
        assert ("cache", timings) in stand_in.calls
        assert ("use cache", False) in stand_in.calls
        assert Path(job["timing_cache"]).read_bytes() == timings + b"+"
    messages_of(StandIn(plan=None), job)
    assert Path(job["timing_cache"]).read_bytes() == b"+++"


def test_logged_errors_do_not_fail_a_build_that_succeeds(job: dict[str, Any]) -> None:
    """TensorRT logs tactics that it skips for lack of memory as errors."""
    errors = ("tactic 7 ran out of memory",)
    assert "done" in messages_of(StandIn(errors=errors), job)[-1]
    assert messages_of(StandIn(plan=None, errors=errors), job)[-1] == {"failed": list(errors)}


def test_the_worker_stops_once_its_reader_is_gone(job: dict[str, Any]) -> None:
    messages: list[Mapping[str, Any]] = []
    compile_engine(StandIn(), job, lambda message: bool(messages.append(message)))  # type: ignore[func-returns-value]
    assert [m for m in messages if "progress" in m] == messages[:1]
    assert "failed" in messages[-1]


def test_the_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Two compilers of one machine's memory are too many: the next build would start another."""
    (tmp_path / "endless.py").write_text("import time\nprint('compiling', flush=True)\ntime.sleep(600)\n")
    start = (
        "import json, os, subprocess, sys\n"
        f"command = [sys.executable, {worker.__file__!r}]\n"
        "worker = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)\n"
        "worker.stdin.write(json.dumps({'module': 'endless', 'parent': os.getpid()}))\n"
        "worker.stdin.close()\n"
        "assert worker.stderr.readline() == 'compiling\\n'\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    for _ in range(1000):
        if not _runs(pid):
            return
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker goes on")


def _runs(pid: int) -> bool:
    """Whether the process ``pid`` is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
