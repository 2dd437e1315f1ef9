"""A scripted worker process, and a machine with other GPUs."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from qie.compiler.backends import local_gpu
from qie.compiler.backends.tensorrt import builder as tensorrt
from qie.engines.backends import BACKENDS
from qie.engines.gpus import Gpu
from qie.engines.machine import Machine
from tests.support.small_graphs import Worker


@pytest.fixture
def worker(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Replaces the worker process by a script (``Worker``)."""

    def put(script: str) -> Path:
        folder = tmp_path_factory.mktemp("worker")
        path = folder / "worker.py"
        path.write_text(
            "import json, os, signal, sys\nfrom pathlib import Path\n"
            f"Path({str(folder / 'called')!r}).touch()\n"
            "def tell(**message): print(json.dumps(message), flush=True)\n"
            "def kill(): os.kill(os.getpid(), signal.SIGKILL)\n"
            f"{script}\n"
        )
        monkeypatch.setattr(tensorrt, "WORKER", path)
        if find_spec("tensorrt_rtx") is None:  # a scripted worker needs only a package with a version
            monkeypatch.setitem(BACKENDS, "tensorrt-rtx", replace(BACKENDS["tensorrt-rtx"], build_module="onnx"))
        return folder / "called"

    return put


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the machine GPUs of these compute capabilities."""

    def pretend(*capabilities: str) -> None:
        pretended = tuple(
            Gpu(index=index, name=f"GPU {c}", compute_capability=c, memory_gib=80.0)
            for index, c in enumerate(capabilities)
        )
        machine = Machine(system="Linux", cpu="CPU", cores=2, memory_gib=24.0, gpus=pretended)
        for module in (tensorrt, local_gpu):
            monkeypatch.setattr(module, "this_machine", lambda: machine)

    return pretend
