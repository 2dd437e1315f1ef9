"""The process that measures memory runs the code of qie alone, and ends with the process that started it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qie.compiler.validation.measure import measured_peak
from qie.engines.errors import EngineError

ENDLESS = """#!/bin/sh
echo $$ > pid.tmp && mv pid.tmp pid
exec {python} -c '
import runpy, sys, time
from qie.engines.editing import editor
editor.Editor = lambda *_, **__: time.sleep(60)
sys.argv = ["measure", "bundle"]
runpy.run_module("qie.compiler.validation.measure", run_name="__main__")
'
"""
"""A Python that says its number and whose edit takes a minute."""

MEASURE = """
import sys
from pathlib import Path
from qie.compiler.validation.measure import measured_peak
sys.executable = "./python"
measured_peak(Path("bundle"))
"""


def runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="there is no bundle") as caught:
        measured_peak(tmp_path)
    assert "foreign" not in str(caught.value)


def test_it_ends_with_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").write_text(ENDLESS.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", MEASURE]) as parent:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.02)
        child = int((tmp_path / "pid").read_text())
        assert runs(child)
        parent.send_signal(signal.SIGKILL)
    ends = time.monotonic() + 30
    while runs(child):
        assert time.monotonic() < ends, "the process outlived its parent"
        time.sleep(0.02)
