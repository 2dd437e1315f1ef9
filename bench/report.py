"""What the benchmarks share: the option ``--json``, the machine and the versions behind the figures, timings."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qie import __version__
from qie.engines.machine import this_machine, version_of

__all__ = ["WARM_UP", "argument_parser", "environment", "median_seconds", "write_report"]

PACKAGES = ("diffusers", "numpy", "onnxruntime", "openvino", "torch", "transformers")

WARM_UP = 3
"""Runs before the timed ones."""


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``, described by the title of a module's docstring."""
    parser = argparse.ArgumentParser(description=(description or "").partition(": ``python")[0])
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    return parser


def environment() -> dict[str, Any]:
    """Machine and versions."""
    machine = this_machine()
    versions = {package: version for package in PACKAGES if (version := version_of(package)) is not None}
    return {"cpu": machine.cpu, "cores": machine.cores, "versions": {"qie": __version__, **versions}}


def write_report(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    """Write ``figures`` and the environment to the file of ``--json``; nothing without it."""
    if options.json is not None:
        report = {"environment": environment(), **figures}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def median_seconds(runs: int, work: Callable[[], Any]) -> float:
    """The median time of ``runs`` calls after WARM_UP calls."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
