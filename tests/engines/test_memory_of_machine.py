"""The memory that a process may use: the machine's, its control group's, its own limit."""

import os
import resource
from pathlib import Path

import pytest

from qie.engines.machine import GIB, memory_bytes, this_machine

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("memory.max", "1073741824\n", GIB), ("memory.max", "max\n", MACHINE),
     ("memory/memory.limit_in_bytes", "2147483648", 2 * GIB),
     ("memory/memory.limit_in_bytes", str(2**63 - 4096), MACHINE), ("memory.max", "", MACHINE),
     ("other", "1", MACHINE)],
)  # fmt: skip
def test_the_control_group(tmp_path: Path, name: str, text: str, expected: int) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert memory_bytes(tmp_path) == expected


def test_a_control_group_inside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user.slice" / "x.scope").mkdir(parents=True)
    (tmp_path / "user.slice" / "x.scope" / "memory.max").write_text("max")
    (tmp_path / "user.slice" / "memory.max").write_text(str(GIB))
    read = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda p, *a: "0::/user.slice/x.scope\n" if p == Path("/proc/self/cgroup") else read(p, *a)
    )
    assert memory_bytes(tmp_path) == GIB


def test_the_address_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (3 * GIB, resource.RLIM_INFINITY))
    assert memory_bytes(tmp_path) == 3 * GIB
    assert this_machine().memory_gib <= 3
