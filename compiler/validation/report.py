"""The report of a validation: what ran on what, the value, the gate, and passed, failed or not run.

``qie.records.to_plain`` gives its JSON data; ``qie.compiler.validation.reports`` writes it for people and for CI.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from qie.engines.bundle.manifest import Component
from qie.engines.machine import Machine

__all__ = [
    "LEVELS",
    "Bisection",
    "CaseImages",
    "Check",
    "Gate",
    "Inapplicable",
    "Level",
    "Measurement",
    "Operation",
    "Provenance",
    "Report",
    "Result",
    "Verdict",
]

Level = Literal["structure", "components", "trajectory", "edits"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""In the order of judgement: an earlier one explains the failures of a later one."""

Result = Literal["passed", "failed", "not run"]
Verdict = Literal["passed", "failed", "incomplete"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """A bound that the value of a check must meet.

    Attributes:
        key: of the recipe, such as ``gates.edits.psnr``; None for a check that counts what must not be, whose bound no
            recipe changes.
        sense: on which side of the bound the value must be.
        bound: allowed itself.
    """

    key: str | None
    sense: Literal["at most", "at least"]
    bound: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` meets the bound; not a number never does."""
        if math.isnan(value):
            return False
        return value <= self.bound if self.sense == "at most" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One check with its verdict.

    Attributes:
        level: that it belongs to.
        name: what is checked, such as ``transformer``; unique with ``case`` in its level.
        case: of the golden file; None for a check of the bundle.
        on: what executed, such as ``onnxruntime 1.32.0, CPU``; empty where nothing did.
        metric: what the value is, such as ``relative L2``.
        unit: of the value, such as ``dB``; empty for a plain number.
        value: None where the check did not run.
        gate: that the value must meet.
        result: not run is never passed.
        detail: what was found, or why it was not run and what to do.
        seconds: that it took.
        steps: values of each denoising step, or of each edit in a row, where there are such.
        step_numbers: number of each of ``steps``, from 1; empty where they follow each other from the first.
    """

    level: Level
    name: str
    case: str | None
    on: str
    metric: str
    unit: str
    value: float | None
    gate: Gate
    result: Result
    detail: str
    seconds: float
    steps: tuple[float, ...] = ()
    step_numbers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """A value and its gate decide; without a value nothing was run."""
        expected = "not run" if self.value is None else "passed" if self.gate.holds(self.value) else "failed"
        assert self.result == expected, (self.name, self.value, self.gate, self.result)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inapplicable:
    """A check that has nothing to judge in this bundle, on what executes here; not one that could not run.

    Attributes:
        level: that it belongs to.
        name: of the check.
        reason: why there is nothing.
    """

    level: Level
    name: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A figure without a gate.

    Attributes:
        name: such as ``denoise``.
        case: of the golden file; None for one of the bundle.
        value: in ``unit``.
        unit: ``s`` or ``bytes``.
        planned: the figure of ``qie plan``; None where there is none.
    """

    name: str
    case: str | None
    value: float
    unit: str
    planned: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class CaseImages:
    """What a person looks at of one case, as PNG files.

    Attributes:
        case: of the golden file.
        instruction: of the edit.
        inputs: the input images.
        reference: the edit of the reference.
        edit: the edit of the engines, of the same size.
    """

    case: str
    instruction: str
    inputs: tuple[bytes, ...]
    reference: bytes
    edit: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One operation of a graph beside the same module of the reference.

    Attributes:
        name: of the module, as in the checkpoint, such as ``transformer_blocks.3.attn.to_q``.
        block: that it belongs to, such as ``transformer_blocks.3``; None outside the blocks.
        similarity: cosine of the two outputs: 1 for equal directions.
        relative_l2: distance of the two outputs.
        tolerance: the largest distance allowed.
        tensors: of the checkpoint, that it reads.
        source: lines that write it, such as ``compiler/graphs/transformer.py:253, compiler/graphs/layers.py:55``.
        whole_block: whether this is the output of a block, which reads all tensors inside it.
    """

    name: str
    block: str | None
    similarity: float
    relative_l2: float
    tolerance: float
    tensors: tuple[str, ...]
    source: str
    whole_block: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Bisection:
    """Where a component leaves the reference.

    Attributes:
        component: whose graph was run.
        case: of the golden file, whose inputs it was run with.
        on: what executed.
        first_block: the first block whose output is outside the tolerance; None where all are within it.
        first_operation: the first operation whose output is; None where all are within it.
        operations: all that were compared, in the order of the graph.
        lacking: modules of the golden file that the graph does not have.
    """

    component: Component
    case: str
    on: str
    first_block: str | None
    first_operation: str | None
    operations: tuple[Operation, ...]
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What was validated, against what, and where.

    Attributes:
        bundle: its folder.
        manifest: sha256 of its manifest.
        model: name of the checkpoint.
        checkpoint: digest of the checkpoint.
        loras: fused into the weights, ``NAME:WEIGHT``.
        recipe: name of the recipe.
        recipe_digest: sha256 of the resolved recipe.
        looser_gates: gates that are looser than in the recipe of that name that comes with qie.
        engines: ``COMPONENT: BACKEND VERSION, COMPUTE CAPABILITY``.
        ran: what executed; None where nothing did.
        golden: the golden file; None without one.
        golden_digest: sha256 of its tensors.
        reference: versions of the packages that made the golden file.
        machine: CPU, memory and GPUs.
        packages: (package, version) of those that executed.
        rebuilt: whether graphs ran in place of the engines.
    """

    bundle: str
    manifest: str
    model: str
    checkpoint: str
    loras: tuple[str, ...]
    recipe: str
    recipe_digest: str
    engines: tuple[str, ...]
    ran: str | None
    golden: str | None
    golden_digest: str | None
    reference: tuple[tuple[str, str], ...]
    machine: Machine
    packages: tuple[tuple[str, str], ...]
    rebuilt: bool = False
    looser_gates: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All of a validation.

    Attributes:
        qie: version.
        created: time of the start, UTC, ISO 8601.
        level: the last one that was asked for.
        required: whether a check that did not run is a failure.
        provenance: bundle, golden file, machine.
        checks: in the order in which they ran.
        inapplicable: checks that have nothing to judge here.
        measurements: figures without a gate.
        images: one for each case whose edit ran.
        bisections: one for each component that was bisected.
        seconds: of the whole validation.
    """

    qie: str
    created: str
    level: Level
    required: bool
    provenance: Provenance
    checks: tuple[Check, ...]
    inapplicable: tuple[Inapplicable, ...]
    measurements: tuple[Measurement, ...]
    images: tuple[CaseImages, ...]
    bisections: tuple[Bisection, ...]
    seconds: float

    def count(self, result: Result) -> int:
        """Number of checks with ``result``."""
        return sum(check.result == result for check in self.checks)

    @property
    def verdict(self) -> Verdict:
        """Failed where a check failed, or nothing ran, or one that is required did not run; passed where all ran."""
        missing = self.count("not run")
        if self.count("failed") or not self.count("passed") or (self.required and missing):
            return "failed"
        return "incomplete" if missing else "passed"
