"""Every benchmark starts, and a report names the machine and the versions behind its figures."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import write_report

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if "def main()" in p.read_text(encoding="utf-8"))


def test_there_are_benchmarks() -> None:
    assert {"cpu_edit", "pocket_quality", "quantization"} <= set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_starts(name: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_a_report_names_machine_and_versions(tmp_path: Path) -> None:
    write_report(argparse.Namespace(json=tmp_path / "report.json"), {"edits": 3})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["edits"] == 3
    assert report["environment"]["cpu"]
    assert report["environment"]["cores"] >= 1
    assert {"qie", "numpy", "onnxruntime"} <= set(report["environment"]["versions"])
