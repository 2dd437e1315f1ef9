"""Timings that nobody measured: seconds that a test gives."""

from dataclasses import replace
from typing import Any

from qie.compiler.validation.timing.record import Conditions, StageTime, Timing
from qie.engines.bundle.specs import Size
from qie.engines.machine import Machine

__all__ = ["CONDITIONS", "steady", "timing"]

CONDITIONS = Conditions(
    cpu="CPU",
    cores=2,
    gpu=None,
    model="tiny",
    digest="d",
    loras=(),
    size=Size(width=128, height=128),
    input_size=Size(width=128, height=128),
    steps=4,
    guidance=1.0,
)


def steady(seconds: float, runs: int = 6, jitter: float = 0.01) -> tuple[float, ...]:
    """``runs`` times around ``seconds``, no two of them equal."""
    return tuple(seconds * (1 + jitter * (run - runs / 2) / runs) for run in range(runs))


def timing(conditions: Conditions = CONDITIONS, **stages: tuple[float, ...]) -> Timing:
    """A timing of the stages ``stages``; the whole edit is their sum."""
    whole = tuple(map(sum, zip(*stages.values(), strict=True)))
    values: dict[str, Any] = {
        "schema": 1,
        "qie": "0",
        "created": "2026-01-01T00:00:00+00:00",
        "bundle": "mine",
        "recipe": "cpu",
        "engines": (),
        "machine": Machine(system="Linux", cpu="CPU", cores=2, memory_gib=8.0, gpus=()),
        "conditions": replace(conditions),
        "warm_up": 2,
        "stages": tuple(StageTime(stage=n, first=1.0, seconds=s) for n, s in (stages | {"edit": whole}).items()),
        "host_peak_bytes": 2**30,
    }
    return Timing(**values)
