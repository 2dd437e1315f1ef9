"""`qie serve` in a process of its own, for the benchmarks that send requests to it."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from qie.compiler.packing.build import build
from qie.compiler.planning.resolve import plan_build

__all__ = ["Served", "batched_pocket", "served"]

_RECIPE = 'extends = "cpu"\n[shapes]\nbatch = {{ max = {batch} }}\n'


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server that runs.

    Attributes:
        url: where it listens.
        pid: number of its process.
    """

    url: str
    pid: int

    @property
    def resident_bytes(self) -> int:
        """Memory of its process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def batched_pocket(folder: Path, *, batch: int) -> Path:
    """Build the pocket model for the CPU with batches of ``batch`` in ``folder``."""
    (folder / "batched.toml").write_text(_RECIPE.format(batch=batch))
    return build(plan_build("pocket", gpu=str(folder / "batched.toml"), out=folder / "pocket")).path


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Served]:
    """Serve ``bundle`` with these options of `qie serve`, and wait until it takes requests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "qie"), "serve", str(bundle), "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            while not _is_ready(url):
                if server.poll() is not None:
                    raise SystemExit(f"`qie serve` ended with {server.returncode}")
                time.sleep(0.1)
            yield Served(url=url, pid=server.pid)
        finally:
            server.terminate()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False
