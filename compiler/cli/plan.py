"""``qie plan``: what a build needs and what an edit costs, as text and as JSON data."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qie.compiler.cli.calibration_lines import calibration_facts, calibration_lines
from qie.compiler.cli.options import (
    DEFAULT_MODEL,
    GpuOption,
    LanguageOption,
    MemoryOption,
    ModelArgument,
    RevisionOption,
)
from qie.engines.cli.options import JsonOption, parse_size, print_json
from qie.engines.terminal import human_bytes, human_memory, human_seconds, say, table, wrap

if TYPE_CHECKING:
    from qie.compiler.planning.estimate import ComponentEstimate, Estimate
    from qie.engines.errors import QieError

__all__ = ["plan"]


def plan(
    model: ModelArgument = DEFAULT_MODEL,
    gpu: GpuOption = "cpu",
    language: LanguageOption = None,
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the edit in pixels.", show_default="the model's area")
    ] = None,
    references: Annotated[int, typer.Option(min=1, help="Number of input images.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the recipe's")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the recipe's")] = None,
    revision: RevisionOption = None,
    memory_gib: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, disk, FLOPs and time.

    Everything is counted from the configs of the model and the peak rates of the GPU; nothing is built or measured. A
    build that does not fit is rejected, and the exit code is 2.
    """
    from qie.compiler.planning.resolve import plan_build

    planned = plan_build(model, gpu=gpu, language=language, revision=revision, allow_unread=True, memory_gib=memory_gib)

    from qie.compiler.planning.estimate import estimate
    from qie.compiler.planning.fit import refusal
    from qie.compiler.planning.workload import workload

    work = workload(planned, size=parse_size(size), references=references, steps=steps, guidance=cfg)
    estimated = estimate(planned, work)
    refused = refusal(estimated)
    if as_json:
        print_json(facts(estimated, refused))
    else:
        say(describe(estimated))
    if refused is not None:
        raise refused


def facts(estimated: "Estimate", refused: "QieError | None") -> dict[str, Any]:
    """The estimate as JSON data; bytes, operations and seconds are plain numbers."""
    from qie.compiler.planning.estimate import REACHABLE
    from qie.engines.machine import GIB
    from qie.engines.records import to_plain

    plan, recipe = estimated.plan, estimated.plan.recipe
    return {
        "model": plan.checkpoint.name,
        "recipe": plan.recipe_name,
        "gpu": recipe.gpu,
        "residency": recipe.residency,
        "edit": to_plain(estimated.workload),
        "components": [to_plain(component) for component in estimated.components],
        "language": [to_plain(component) for component in estimated.language],
        "calibration": calibration_facts(plan, estimated.calibration),
        "disk_bytes": estimated.disk_bytes,
        "build_disk_bytes": plan.disk_bytes,
        "gpu_bytes": estimated.gpu_bytes,
        "gpu_memory_bytes": int(recipe.memory_gib * GIB),
        "host_bytes": estimated.host_bytes,
        "host_limit_bytes": plan.memory,
        "flops": estimated.flops,
        "seconds_at_peak": estimated.seconds,
        "reachable": REACHABLE,
        "refusal": None if refused is None else str(refused),
    }


def describe(estimated: "Estimate") -> str:
    """The estimate as four tables: the build, memory on the GPU, one run of each component, the whole edit."""
    plan, recipe, work = estimated.plan, estimated.plan.recipe, estimated.workload
    images = f"{work.references} image{'s' if work.references > 1 else ''}"
    guidance = f"guidance {work.guidance:g} (two passes per step)" if work.passes > 1 else "no guidance"
    times = (
        "the times follow from the peak rates in the GPU's datasheet, which real runs do not reach"
        if estimated.seconds
        else "the peak rates of this GPU are not known"
    )
    where, rest = ("GPU", "") if recipe.compute_capability else ("CPU", ", the process and its images")
    return "\n".join(
        [
            f"{plan.checkpoint.name} ({plan.model.pipeline}), recipe {plan.recipe_name} for {recipe.gpu}",
            "",
            "Build",
            "",
            _build_table(estimated),
            "",
            f"disk while building: {human_bytes(plan.disk_bytes)}, with --stream one shard of the checkpoint more",
            f"host memory: {human_memory(estimated.host_bytes)} of {human_memory(plan.memory)}",
            *calibration_lines(plan, estimated.calibration),
            "",
            f"{where} memory in the largest edit that the recipe allows",
            "",
            _memory_table(estimated),
            "",
            f"{recipe.residency} engines{rest}: {human_memory(estimated.gpu_bytes)} of {recipe.memory_gib:g} GiB",
            *_shortages(estimated),
            "",
            *(wrap(line) for line in (f"One run of each component: {work.size}, {images}", *work.notes)),
            "",
            _run_table(estimated),
            "",
            f"The whole edit: {work.steps} steps, {guidance}",
            "",
            _edit_table(estimated),
            *_language(estimated),
            "",
            wrap(f"Counted from the graphs, not measured; {times}."),
        ]
    )


def _shortages(estimated: "Estimate") -> list[str]:
    """What this machine lacks of the memory that the build needs, and on a CPU the edit."""
    from qie.engines.machine import memory_bytes

    here = memory_bytes()
    needs = [("the build", estimated.host_bytes)]
    if estimated.plan.recipe.compute_capability is None:
        needs.append(("the largest edit", estimated.gpu_bytes))
    return [
        wrap(f"note: {what} needs {human_memory(needed)}, and this machine has {human_memory(here)}")
        for what, needed in needs
        if needed > here
    ]


def _build_table(estimated: "Estimate") -> str:
    plan = estimated.plan
    rows = [
        [c.component, c.backend, str(c.parts), human_bytes(c.disk_bytes), human_memory(c.host_bytes)]
        for c in estimated.components
    ]
    if plan.recipe.modulation == "weights":
        rows.append(["modulation", "", "", human_bytes(plan.modulation_bytes), ""])
    rows.append([f"tables, {plan.table_steps} steps", "", "", human_bytes(plan.tables_bytes), ""])
    rows.append(["total", "", "", human_bytes(estimated.disk_bytes), ""])
    return table(rows, header=["component", "backend", "engines", "disk", "host memory"], right=[2, 3, 4])


def _memory_table(estimated: "Estimate") -> str:
    rows = [
        [
            c.component,
            human_memory(c.weights_bytes),
            human_memory(c.largest_activation_bytes),
            human_memory(c.largest_io_bytes),
            human_memory(c.workspace_bytes) if c.workspace_bytes else "-",
        ]
        for c in estimated.components
    ]
    rows.append(["total", human_memory(sum(c.weights_bytes for c in estimated.components)), "", "", ""])
    header = ["component", "weights", "activations", "inputs, outputs", "workspace"]
    return table(rows, header=header, right=range(1, 5))


def _run_table(estimated: "Estimate") -> str:
    rows = [
        [
            c.component,
            *(_operations(c.cost.flops(kind)) for kind in ("gemm", "convolution", "attention")),
            human_bytes(c.cost.moved_bytes),
            human_memory(c.cost.activation_bytes),
        ]
        for c in estimated.components
    ]
    header = ["component", "GEMM", "convolution", "attention", "memory traffic", "activations"]
    return table(rows, header=header, right=range(1, 6))


def _edit_table(estimated: "Estimate") -> str:
    from qie.compiler.planning.estimate import REACHABLE

    def times(of: "ComponentEstimate | Estimate") -> list[str]:
        if of.seconds is None:
            return ["-", "-"]
        return [human_seconds(of.seconds), human_seconds(of.seconds / REACHABLE)]

    rows = [[c.component, str(c.runs), _operations(c.runs * c.cost.flops()), *times(c)] for c in estimated.components]
    rows.append(["total", "", _operations(estimated.flops), *times(estimated)])
    header = ["component", "runs", "operations", "time at peak", f"time at {100 * REACHABLE:g}% of peak"]
    return table(rows, header=header, right=range(1, 5))


def _language(estimated: "Estimate") -> list[str]:
    """The language model on every backend that can run it, where there is a choice."""
    if len(estimated.language) < 2:
        return []
    preferred = estimated.plan.recipe.backends_of("language")
    rows = [
        [
            c.backend,
            str(preferred.index(c.backend) + 1) if c.backend in preferred else "-",
            human_memory(c.host_bytes),
            human_memory(c.weights_bytes),
            human_memory(c.working_bytes),
            "-" if c.seconds is None else human_seconds(c.seconds),
        ]
        for c in estimated.language
    ]
    header = ["backend", "choice", "host memory", "weights", "working memory", "time at peak"]
    title = "The language model by backend; choice is the recipe's order, and - is none of it"
    return ["", title, "", table(rows, header=header, right=range(1, 6))]


def _operations(count: int) -> str:
    """A number of operations: ``166.2 TFLOP``."""
    for unit, size in (("P", 10**15), ("T", 10**12), ("G", 10**9)):
        if count >= size:
            return f"{count / size:.1f} {unit}FLOP"
    return f"{count / 10**6:.1f} MFLOP" if count else "-"
