"""Processes that are killed before one of their file operations: ``python -m tests.support.killing`` is one of them.

CPython announces every operation that changes files to audit hooks (PEP 578) before it happens.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.support.repository import ROOT

__all__ = ["count_operations", "kill_at"]

CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate", "os.utime", "fcntl.flock",
           "ctypes.dlsym", "shutil.rmtree", "shutil.copyfile")  # fmt: skip
"""Audit events of what changes files or locks; ``ctypes.dlsym`` precedes the exchange of two names."""


def count_operations(module: str, *arguments: str | Path) -> int:
    """How many file operations ``module:function`` makes with ``arguments``."""
    done = _run(module, arguments, 0, "9")
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def kill_at(operation: int, signal: int, module: str, *arguments: str | Path) -> int:
    """Run ``module:function`` and send it ``signal`` before its file operation number ``operation``; its exit code."""
    return _run(module, arguments, operation, str(signal)).returncode


def _run(
    module: str, arguments: Sequence[str | Path], operation: int, signal: str
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.support.killing", str(operation), signal, module, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def _hook(operation: int, signal: int) -> tuple[Callable[..., None], list[int]]:
    seen = [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            seen[0] += 1
            if seen[0] == operation:
                os.kill(os.getpid(), signal)

    return hook, seen


def _main() -> None:
    operation, signal, target, *arguments = sys.argv[1:]
    module, _, function = target.partition(":")
    action = getattr(__import__(module, fromlist=[function]), function)
    hook, seen = _hook(int(operation), int(signal))
    sys.addaudithook(hook)
    action(*arguments)
    sys.stdout.write(f"{seen[0]}\n")


if __name__ == "__main__":
    _main()
