"""A timing: seconds of every stage over several runs, with what must be equal for two timings to be comparable."""

from dataclasses import dataclass
from statistics import median, quantiles
from typing import Annotated, Any, Literal

from qie.engines.bundle.specs import Size
from qie.engines.machine import Machine
from qie.engines.records import Range

__all__ = ["WHOLE", "Conditions", "StageTime", "Timing"]

WHOLE = "edit"
"""The name of the whole edit among the stages."""

Seconds = Annotated[float, Range(0, 1e9)]
_Bytes = Annotated[int, Range(0, 1 << 60)]
_Count = Annotated[int, Range(0, 1 << 20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """The time of one stage.

    Attributes:
        stage: its name, ``other`` for what is in no stage, ``edit`` for the whole.
        first: seconds of the first edit, with the loading of engines.
        seconds: of each measured edit.
    """

    stage: str
    first: Seconds
    seconds: tuple[Seconds, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError(f"the stage {self.stage!r} has no measured edit")

    @property
    def median(self) -> float:
        """Seconds of the median."""
        return median(self.seconds)

    @property
    def least(self) -> float:
        """Seconds of the fastest."""
        return min(self.seconds)

    @property
    def p90(self) -> float:
        """Seconds that 90 % of the runs do not exceed, interpolated between the two nearest."""
        return self.seconds[0] if len(self.seconds) < 2 else quantiles(self.seconds, n=10, method="inclusive")[8]

    @property
    def spread(self) -> float:
        """Seconds between the first and the third quartile."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return high - low


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What two timings must share.

    Attributes:
        cpu: name of the CPU.
        cores: that the process may use.
        gpu: name of the GPU that runs the engines; None where they run on the CPU.
        model: name of the checkpoint.
        digest: of the checkpoint.
        loras: fused into the weights, ``NAME:WEIGHT``.
        size: of the result.
        input_size: of the input image.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
    """

    cpu: str
    cores: _Count
    gpu: str | None
    model: str
    digest: str
    loras: tuple[str, ...]
    size: Size
    input_size: Size
    steps: Annotated[int, Range(1, 1000)]
    guidance: Annotated[float, Range(-1e6, 1e6)]

    def facts(self) -> dict[str, Any]:
        """Every condition by the name that a message has for it."""
        return {
            "CPU": self.cpu,
            "number of cores": self.cores,
            "GPU": self.gpu or "no GPU",
            "model": self.model,
            "digest of the model": self.digest,
            "LoRAs": ", ".join(self.loras) or "no LoRAs",
            "size": str(self.size),
            "size of the input": str(self.input_size),
            "number of steps": self.steps,
            "guidance scale": self.guidance,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The times of a bundle.

    Attributes:
        schema: version of this layout.
        qie: version that timed.
        created: time of the start, UTC, ISO 8601.
        bundle: name of the bundle.
        recipe: name of its recipe.
        engines: ``COMPONENT: BACKEND VERSION, PRECISION, COMPUTE CAPABILITY`` of those that ran.
        machine: on which it was timed.
        conditions: that another timing must share.
        warm_up: edits before the measured ones, after the first.
        stages: in the order of an edit, then ``other`` and ``edit``.
        host_peak_bytes: peak memory of the process since its start, mapped files included.
        gpu_peak_bytes: most memory of the GPU in use during the first edit, by all processes; None on a CPU and where
            the backend does not report it.
    """

    schema: Literal[1]
    qie: str
    created: str
    bundle: str
    recipe: str
    engines: tuple[str, ...]
    machine: Machine
    conditions: Conditions
    warm_up: _Count
    stages: tuple[StageTime, ...]
    host_peak_bytes: _Bytes
    gpu_peak_bytes: _Bytes | None = None

    def __post_init__(self) -> None:
        names = [stage.stage for stage in self.stages]
        if len(set(names)) != len(names) or WHOLE not in names:
            raise ValueError(f"the stages are {', '.join(names) or 'none'}, expected each once and {WHOLE!r}")
        if len({len(stage.seconds) for stage in self.stages}) != 1:
            raise ValueError("the stages differ in their number of measured edits")

    @property
    def repeats(self) -> int:
        """Number of measured edits."""
        return len(self.stages[0].seconds)

    def stage(self, name: str) -> StageTime | None:
        """The stage ``name``; None where it did not run."""
        return next((stage for stage in self.stages if stage.stage == name), None)
