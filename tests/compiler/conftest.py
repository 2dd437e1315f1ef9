"""Another worker in the place of the real one, and a machine with other GPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qie.compiler.backends.tensorrt import builder as tensorrt
from qie.engines.machine import Gpu, Machine
from tests.support.hand_made import Worker


@pytest.fixture
def worker(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Puts a script in the place of the worker; returns the file that is there once it was called."""

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
        return folder / "called"

    return put


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the machine have GPUs of these compute capabilities."""

    def pretend(*capabilities: str) -> None:
        found = tuple(Gpu(name=f"GPU {c}", compute_capability=c, memory_gib=80.0, driver="600") for c in capabilities)
        machine = Machine(system="Linux", processor="CPU", cores=2, memory_gib=24.0, gpus=found)
        monkeypatch.setattr(tensorrt, "this_machine", lambda: machine)

    return pretend
