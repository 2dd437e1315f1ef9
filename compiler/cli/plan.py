"""What `qie plan` prints: an estimate as text, an estimate as JSON data."""

from typing import Any

from qie.compiler.planning.estimate import REACHABLE, ComponentEstimate, Estimate
from qie.engines.errors import QieError
from qie.engines.machine import GIB
from qie.engines.records import to_plain
from qie.engines.terminal import human_bytes, table

__all__ = ["describe", "facts"]


def facts(found: Estimate, refusal: QieError | None) -> dict[str, Any]:
    """The estimate as JSON data; bytes, operations and seconds are plain numbers."""
    plan, recipe = found.plan, found.plan.recipe
    return {
        "model": plan.checkpoint.name,
        "recipe": plan.recipe_name,
        "gpu": recipe.gpu,
        "residency": recipe.residency,
        "edit": to_plain(found.workload),
        "components": [to_plain(part) for part in found.components],
        "disk_bytes": found.disk_bytes,
        "card_bytes": found.card_bytes,
        "card_memory_bytes": int(recipe.memory_gib * GIB),
        "host_bytes": found.host_bytes,
        "host_limit_bytes": int(recipe.limits.host_memory_gib * GIB),
        "flops": found.flops,
        "seconds_at_peak": found.seconds,
        "reachable": REACHABLE,
        "refusal": None if refusal is None else str(refusal),
    }


def describe(found: Estimate) -> str:
    """The estimate as two tables: what a build needs, what an edit costs."""
    plan, recipe, work = found.plan, found.plan.recipe, found.workload
    images = f"{work.references} image{'s' if work.references > 1 else ''}"
    guidance = f"guidance {work.guidance:g} (two passes a step)" if work.passes > 1 else "no guidance"
    return "\n".join(
        [
            f"{plan.checkpoint.name} ({plan.model.pipeline}) by recipe {plan.recipe_name} for {recipe.gpu}",
            "",
            "A build, and the memory of its engines in the largest edit that the recipe allows",
            "",
            table(_memory_rows(found), header=_MEMORY, right=range(2, len(_MEMORY))),
            "",
            f"on the card, {recipe.residency}: {human_bytes(found.card_bytes)} of {_gib(recipe.memory_gib)}; "
            f"on the host: {human_bytes(found.host_bytes)} of {_gib(recipe.limits.host_memory_gib)}",
            "",
            f"An edit of {work.size} from {images}, {work.steps} steps, {guidance}",
            *work.notes,
            "",
            table(_edit_rows(found), header=_EDIT, right=range(1, len(_EDIT))),
            "",
            "Counted from the graphs, nothing was measured; "
            + (
                "the times are what the card's datasheet allows."
                if found.seconds
                else "this GPU's peaks are not known."
            ),
        ]
    )


_MEMORY = ["component", "backend", "disk", "card", "activations", "in, out", "workspace", "host to build"]
_EDIT = ["component", "GEMM", "convolution", "attention", "moved", "activations", "runs", "all runs"]
_EDIT += ["at 100 %", f"at {100 * REACHABLE:g} %"]


def _memory_rows(found: Estimate) -> list[list[str]]:
    plan = found.plan
    rows = [
        [
            c.component,
            c.backend,
            human_bytes(c.disk_bytes),
            human_bytes(c.weights_bytes),
            human_bytes(c.largest_activation_bytes),
            human_bytes(c.largest_io_bytes),
            human_bytes(c.workspace_bytes) if c.workspace_bytes else "-",
            human_bytes(c.host_bytes),
        ]
        for c in found.components
    ]
    on_card = sum(c.weights_bytes for c in found.components)
    rows.append(["modulation", "", human_bytes(plan.modulation_bytes), "-", *[""] * 4])
    rows.append([f"tables, {plan.table_steps} steps", "", human_bytes(plan.tables_bytes), "-", *[""] * 4])
    rows.append(["all", "", human_bytes(found.disk_bytes), human_bytes(on_card), *[""] * 4])
    return rows


def _edit_rows(found: Estimate) -> list[list[str]]:
    rows = [
        [
            c.component,
            *(_operations(c.cost.flops(kind)) for kind in ("gemm", "convolution", "attention")),
            human_bytes(c.cost.moved_bytes),
            human_bytes(c.cost.activation_bytes),
            str(c.runs),
            _operations(c.runs * c.cost.flops()),
            *_times(c),
        ]
        for c in found.components
    ]
    rows.append(["all", *[""] * 6, _operations(found.flops), *_times(found)])
    return rows


def _times(found: ComponentEstimate | Estimate) -> list[str]:
    if found.seconds is None:
        return ["-", "-"]
    return [f"{seconds:.3g} s" for seconds in (found.seconds, found.seconds / REACHABLE)]


def _operations(count: int) -> str:
    """Operations for people: ``166.2 TFLOP``."""
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9)):
        if count >= size:
            return f"{count / size:.1f} {unit}FLOP"
    return f"{count / 10**6:.1f} MFLOP" if count else "-"


def _gib(size: float) -> str:
    return f"{human_bytes(int(size * GIB))} ({size:g} GiB)"
