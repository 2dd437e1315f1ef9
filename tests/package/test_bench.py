"""Every benchmark starts, and a report names the machine and the versions behind its figures."""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bench.report import write_report
from bench.stages import Stages, plain_read, plain_write

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


def test_what_is_fetched_begins_no_stage_and_is_counted() -> None:
    stages = Stages()
    stages("weights", 0, 10)
    fetcher = threading.Thread(target=lambda: stages("fetch", 1, 2))
    with stages.fetching(7):
        fetcher.start()
        fetcher.join()
    stages("weights", 10, 10)
    with pytest.raises(KeyError), stages.stage("graphs"):
        raise KeyError
    assert stages.costs["graphs"].seconds > 0  # a stage that fails is measured too
    stages.end()
    assert list(stages.costs) == ["weights", "graphs"]
    assert (stages.costs["weights"].total, stages.fetched_bytes) == (10, 7)
    assert 0 < stages.fetch_seconds <= stages.costs["weights"].seconds


def test_a_floor_reads_and_writes_the_bytes(tmp_path: Path) -> None:
    assert plain_write(tmp_path / "file", 20_000_000) > 0
    assert (tmp_path / "file").stat().st_size == 20_000_000
    assert plain_read(tmp_path / "file") > 0
