"""The words and numbers that all formats share: values with units, counts, and text without control characters."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from qie.compiler.validation.report import LEVELS, Bisection, Check, Level, Operation, Provenance, Report
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.machine import Machine
from qie.engines.terminal import human_memory, human_seconds, printable

__all__ = [
    "by_level",
    "by_similarity",
    "cases",
    "clean",
    "cosine_words",
    "counts",
    "facts",
    "finding",
    "first_operation",
    "first_outside",
    "grouped",
    "machine_words",
    "missing",
    "number",
    "quantity",
    "ran",
    "subject",
    "summary",
    "value_words",
    "within",
    "worst",
]

_UNENCODABLE = re.compile("[\ud800-\udfff\ufffe\uffff]")
"""Surrogates, as in names of files that are not UTF-8, and what XML excludes besides controls (XML 1.0, 2.2)."""


def clean(text: str) -> str:
    """``text`` with escapes in place of controls, marks of direction, and what UTF-8 or XML cannot hold."""
    return _UNENCODABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", printable(text))


def number(value: float) -> str:
    """A number in four digits; whole ones in full, and ``nan``, ``inf`` or ``-inf`` where it is not finite."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def quantity(value: float, unit: str) -> str:
    """A value with its unit, such as ``31.2 dB``, ``1.5 GiB`` or ``12 ms``."""
    if unit == "s" and math.isfinite(value) and value >= 0:
        return human_seconds(value)
    if unit == "bytes" and math.isfinite(value) and value >= 0:
        return human_memory(value)
    return f"{number(value)} {unit}".rstrip()


def value_words(check: Check) -> str:
    """The value of a check with its unit, in as many digits as tell it from a bound that it does not meet; a dash where
    it did not run."""
    if check.value is None:
        return "–"
    shown = number(check.value)
    if check.result == "failed" and math.isfinite(check.value) and check.gate.holds(float(shown)):
        return clean(f"{check.value:.9g} {check.unit}".rstrip())
    return clean(quantity(check.value, check.unit))


def cosine_words(similarity: float) -> str:
    """A cosine with the digits that tell values near 1 apart."""
    return f"{similarity:.6f}"


def first_operation(bisection: Bisection) -> Operation | None:
    """The first operation outside its tolerance; None where all are within it."""
    return next((op for op in bisection.operations if op.name == bisection.first_operation), None)


def first_outside(report: Report) -> Bisection | None:
    """The bisection whose component is the first in an edit to leave the reference; None where none does."""
    found = [b for b in report.bisections if b.first_block is not None or b.first_operation is not None]
    return min(found, key=lambda bisection: COMPONENTS.index(bisection.component), default=None)


def within(bisection: Bisection) -> str:
    """What there is to say of a bisection in which nothing is outside its tolerance."""
    count = len(bisection.operations)
    largest = max(bisection.operations, key=lambda op: op.relative_l2, default=None)
    if largest is None:
        return "no operation was compared"
    near = f"the largest relative L2 is {number(largest.relative_l2)} in {clean(largest.name)}"
    return f"all {count} operations are within their tolerance, {near}"


def grouped(checks: Iterable[Check]) -> list[tuple[Check, ...]]:
    """The checks of a level for one row each: the passed cases of one check together, every other by itself."""
    rows: dict[tuple[str, int], list[Check]] = {}
    for place, check in enumerate(checks):
        rows.setdefault((check.name, -1 if check.result == "passed" else place), []).append(check)
    return [tuple(row) for row in rows.values()]


def worst(group: Sequence[Check]) -> Check:
    """The check of a row whose value is nearest to the gate, or beyond it."""
    choose = max if group[0].gate.sense == "at most" else min
    return choose(group, key=lambda check: math.nan if check.value is None else check.value)


def cases(group: Sequence[Check]) -> str:
    """The cases of a row: the only one, or how many and the worst of them where their values differ."""
    if len(group) == 1:
        return clean(group[0].case or "")
    count = str(len(group)) if all(check.case in COMPONENTS for check in group) else f"{len(group)} cases"
    alike = len({value_words(check) for check in group}) == 1
    return count if alike else f"{count}, worst {clean(worst(group).case or '')}"


def finding(check: Check) -> str:
    """The value of a check against its gate: ``SSIM 0.9871, gate at least 0.999``."""
    return f"{clean(check.metric)} {value_words(check)}, gate {check.gate}"


def subject(check: Check) -> str:
    """The check and its case in one line: ``psnr (two images)``."""
    return clean(check.name if check.case is None else f"{check.name} ({check.case})")


def counts(checks: Iterable[Check]) -> dict[str, int]:
    """The number of checks with each result, in the order passed, failed, not run."""
    results = [check.result for check in checks]
    return {result: results.count(result) for result in ("passed", "failed", "not run")}


def summary(report: Report) -> str:
    """The counts and the verdict: ``12 passed, 0 failed, 3 not run: incomplete``."""
    parts = (f"{count} {result}" for result, count in counts(report.checks).items())
    return f"{', '.join(parts)}: {report.verdict}"


def by_level(report: Report) -> Mapping[Level, tuple[Check, ...]]:
    """The checks of each level that has any, in the order of the levels."""
    groups = {level: tuple(check for check in report.checks if check.level == level) for level in LEVELS}
    return {level: checks for level, checks in groups.items() if checks}


def missing(checks: Iterable[Check]) -> dict[str, list[Check]]:
    """The checks that did not run, by the reason."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        if check.result == "not run":
            groups.setdefault(check.detail, []).append(check)
    return groups


def by_similarity(bisection: Bisection) -> list[Operation]:
    """The operations of a bisection, the least similar first; what is not a number is the least."""

    def rank(operation: Operation) -> tuple[float, float]:
        if math.isnan(operation.similarity):
            return -math.inf, 0.0
        return round(operation.similarity, 6), -operation.relative_l2

    return sorted(bisection.operations, key=rank)


def machine_words(machine: Machine) -> str:
    """A machine in one line."""
    gpus = [f"{gpu.name} ({gpu.compute_capability}, {gpu.memory_gib:g} GiB)" for gpu in machine.gpus]
    parts = [machine.cpu, f"{machine.cores} cores", f"{machine.memory_gib:g} GiB", *(gpus or ["no GPU"])]
    driver = [f"driver {machine.driver}"] if machine.driver else []
    cuda = [f"CUDA {machine.cuda}"] if machine.cuda else []
    return ", ".join([*parts, *driver, *cuda, machine.system])


def ran(origin: Provenance) -> str:
    """What executed: the engines of the bundle, graphs in their place, or nothing."""
    if origin.ran is None:
        return "nothing: no engine and no graph"
    return origin.ran if origin.rebuilt else f"the engines of the bundle: {origin.ran}"


def facts(report: Report) -> dict[str, tuple[str, ...]]:
    """What was validated, against what, where and with which packages: lines of text by their name."""
    origin = report.provenance
    lines: dict[str, tuple[str, ...]] = {
        "Bundle": (origin.bundle,),
        "Manifest, sha256": (origin.manifest,),
        "Model": (origin.model,),
        "Checkpoint, digest": (origin.checkpoint,),
        "LoRAs": origin.loras or ("none",),
        "Recipe": (origin.recipe,),
        "Recipe, sha256": (origin.recipe_digest,),
        "Looser gates": origin.looser_gates,
        "Engines": origin.engines,
        "Ran": (ran(origin),),
        "Golden file": (origin.golden or "none",),
        "Golden tensors, sha256": (origin.golden_digest,) if origin.golden_digest else (),
        "Reference": tuple(f"{name} {version}" for name, version in origin.reference),
        "Machine": (machine_words(origin.machine),),
        "Packages": tuple(f"{name} {version}" for name, version in origin.packages),
        "qie": (report.qie,),
        "Does not apply": tuple(f"{absent.name}: {absent.reason}" for absent in report.inapplicable),
        "Started": (report.created,),
        "Took": (quantity(report.seconds, "s"),),
    }
    return {name: tuple(map(clean, texts)) for name, texts in lines.items() if texts}
