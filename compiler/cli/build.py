"""``qie build``: a plan on the screen, then a bundle on the disk."""

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qie.compiler.cli.calibration_lines import calibration_facts, calibration_lines
from qie.compiler.cli.options import (
    DEFAULT_MODEL,
    AllowUnreadOption,
    CalibrationOption,
    GpuOption,
    LanguageOption,
    LoraOption,
    MemoryOption,
    ModelArgument,
    RevisionOption,
    ScheduleOption,
)
from qie.engines.cli.options import DeviceOption, JsonOption, print_json
from qie.engines.errors import BuildError
from qie.engines.terminal import Bars, ago, human_bytes, human_count, printable, say, table, wrap

if TYPE_CHECKING:
    from qie.compiler.planning.plan import Plan, PlannedComponent
    from qie.engines.bundle.bundle import Bundle

__all__ = ["build"]


def build(
    model: ModelArgument = DEFAULT_MODEL,
    gpu: GpuOption = "cpu",
    language: LanguageOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the bundle.", show_default="$QIE_HOME/bundles/NAME")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle.", show_default="MODEL-GPU")] = None,
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to calibrate with, like those to be edited.", show_default="built-in images"
        ),
    ] = None,
    revision: RevisionOption = None,
    schedule: ScheduleOption = None,
    allow_unread: AllowUnreadOption = False,
    memory_gib: MemoryOption = None,
    finish: Annotated[
        str | None,
        typer.Option(metavar="BUNDLE", help="Build the engines that BUNDLE lacks, on the machine with its GPU."),
    ] = None,
    device: DeviceOption = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Fetch weights one shard at a time and delete each when it was read, to save disk."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, say whether it fits, stop; downloads only the configs.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle of another model, recipe or LoRA without asking.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the engines of a model for one GPU.

    The plan is printed first. A build that cannot run, does not fit or lacks disk space stops there, before any weights
    are downloaded.
    """
    if finish is not None and language is not None:
        raise BuildError(
            "a bundle is finished by its own recipe; build it again for another backend", option="language"
        )
    if finish is not None and memory_gib is not None:
        raise BuildError(
            "a bundle is finished in the parts that it has; build it again to divide it otherwise", option="memory_gib"
        )
    if finish is not None:
        return _finish(finish, device=device, dry_run=dry_run, as_json=as_json)
    from qie.compiler.packing.build import build as build_bundle
    from qie.compiler.planning.resolve import plan_build

    plan = plan_build(
        model,
        gpu=gpu,
        loras=lora or (),
        calibration=calibration,
        out=out,
        name=name,
        revision=revision,
        schedule=schedule,
        allow_unread=allow_unread,
        device=device,
        language=language,
        memory_gib=memory_gib,
    )
    from qie.compiler.packing.calibrate import for_images
    from qie.compiler.packing.shard_sources import check_whole
    from qie.compiler.planning.fit import check_fit

    plan = for_images(plan, images, calibration)
    if not as_json:
        say(describe(plan, images))
    elif dry_run:
        print_json(facts(plan))
    if dry_run:
        if not stream:
            check_whole(plan.checkpoint)
        return check_fit(plan)
    if not overwrite:
        _ask_before_replacing(plan)
    with Bars(enabled=not as_json) as bars:
        bundle = build_bundle(plan, images=images, stream=stream, progress=bars)
    return _print_built(bundle, as_json=as_json)


def _ask_before_replacing(plan: "Plan") -> None:
    """Ask whether another bundle at the destination may be replaced.

    Raises:
        BuildError: it may not, or nobody answers.
    """
    from qie.compiler.planning.checks import other_bundle
    from qie.engines.bundle.manifest import MANIFEST

    old = other_bundle(plan)
    if old is None:
        return
    made = old.manifest
    loras = "".join(f" with {lora.name}:{lora.weight:g} (sha256 {lora.sha256[:8]})" for lora in made.loras)
    revision = "" if made.model.revision is None else f", revision {made.model.revision[:12]}"
    what = f"{made.model.name}{revision}, recipe {made.recipe.name}{loras}"
    built = ago((old.path / MANIFEST).stat().st_mtime)
    question = printable(f"replace {old.path} ({what}, {built})?")
    try:
        if sys.stdin is not None and sys.stdin.isatty() and typer.confirm(question):
            return
    except typer.Abort:
        say()
    raise BuildError(
        f"{old.path} is another bundle ({what}, {built}) and stays; choose another name with --name, or replace it "
        "with --overwrite",
        option="name",
    )


def facts(plan: "Plan") -> dict[str, Any]:
    """The plan as JSON data."""
    from qie.compiler.planning.checks import missing_builder

    return {
        "model": plan.checkpoint.name,
        "revision": plan.checkpoint.revision,
        "pipeline": plan.model.pipeline,
        "recipe": plan.recipe_name,
        "schedule": plan.schedule,
        "notes": list(plan.notes),
        "destination": str(plan.destination),
        "bytes": plan.bytes,
        "download_bytes": plan.checkpoint.missing_bytes(),
        "modulation": plan.recipe.modulation,
        "modulation_bytes": plan.modulation_bytes,
        "tables_bytes": plan.tables_bytes,
        "calibration": calibration_facts(plan),
        "components": [
            {
                "component": c.component,
                "backend": c.backend,
                "finish": c.finish,
                "problem": missing_builder(plan, c.component),
                "precision": c.precision,
                "scheme": c.scheme,
                "attention": c.attention,
                "parts": len(c.parts),
                "nodes": c.nodes,
                "parameters": c.parameters,
                "bytes": c.bytes,
                "finish_bytes": c.finish_bytes,
            }
            for c in plan.components
        ],
    }


def describe(plan: "Plan", images: Path | None = None) -> str:
    """The plan as text: what is built from what, and what has to be downloaded.

    ``images`` are those that a calibration is made of; None for the built-in ones.
    """
    from qie.compiler.planning.checks import missing_builder

    loras = ", ".join(f"{lora.name}:{lora.weight:g}" for lora in plan.loras) or "none"
    heading = [
        f"{plan.checkpoint.name} ({plan.model.pipeline}), recipe {plan.recipe_name}, LoRAs: {loras}",
        f"bundle: {plan.destination}",
        f"schedule: {_schedule(plan)}",
    ]
    if plan.checkpoint.revision is not None:
        heading.append(f"download: {_download(plan)}")
    heading += calibration_lines(plan, images=images)
    sections = ["\n".join(heading), _components(plan)]
    problem = next(filter(None, (missing_builder(plan, c.component) for c in plan.components)), None)
    if problem is not None:
        sections.append(wrap(f"no builder: {problem}"))
    sections += [wrap(f"note: {note}") for note in plan.notes]
    sections += _later(plan)
    return "\n\n".join(sections) + "\n"


def _later(plan: "Plan") -> list[str]:
    """What stays in the bundle for the machine with the GPU, and the command of TensorRT-LLM."""
    from qie.engines.backends import BACKENDS

    sections = []
    for backend in dict.fromkeys(c.finish for c in plan.components if c.finish is not None):
        later = [c for c in plan.components if c.finish == backend]
        what = "the graphs" if BACKENDS[backend].source == "graph" else f"the checkpoint of {later[0].component}"
        sections.append(
            wrap(
                f"{backend} builds only on the machine with the GPU ({plan.recipe.gpu}): {what}, "
                f"{human_bytes(sum(c.finish_bytes for c in later))}, for `qie build --finish` there"
            )
        )
    if any("tensorrt-llm" in (c.backend, c.finish) for c in plan.components):
        caller = "`qie build --finish`" if any(c.finish == "tensorrt-llm" for c in plan.components) else "this build"
        sections.append("\n".join([f"for TensorRT-LLM {caller} runs", "", *_command(plan)]))
    return sections


def _command(plan: "Plan") -> list[str]:
    """The command of TensorRT-LLM, a flag a line."""
    from qie.compiler.backends.tensorrt_llm.builder import command_of
    from qie.compiler.planning.profiles import profiles

    graph = next(c.graph for c in plan.components if c.component == "language")
    words = command_of(Path("CHECKPOINT"), Path("ENGINE"), profiles(graph, plan.recipe, plan.model), plan.recipe)
    lines = [f"    {words[0]}"]
    for word in words[1:]:
        if word.startswith("--"):
            lines.append(f"        {word}")
        else:
            lines[-1] += f" {word}"
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _schedule(plan: "Plan") -> str:
    default = plan.model.schedules(plan.recipe)[0]
    guidance = f"guidance {default.guidance:g}" if default.guidance > 1 else "no guidance"
    return f"{plan.schedule}, {default.steps} steps, {guidance}"


def _download(plan: "Plan") -> str:
    import shutil

    from qie.engines.files import existing

    missing, cache = plan.checkpoint.missing_bytes(), existing(plan.checkpoint.path)
    if missing == 0:
        return "nothing, the weights are in the cache"
    size = "weights of unknown size, since the hub does not answer" if missing is None else human_bytes(missing)
    return f"{size}, to a disk with {human_bytes(shutil.disk_usage(cache).free)} free"


def _components(plan: "Plan") -> str:
    rows = [
        [_title(c), _backend(c), c.computes, str(c.nodes), human_count(c.parameters), human_bytes(c.bundle_bytes)]
        for c in plan.components
    ]
    nodes, parameters = sum(c.nodes for c in plan.components), sum(c.parameters for c in plan.components)
    if plan.recipe.modulation == "weights":
        rows.append(["modulation", "", "", "", "", human_bytes(plan.modulation_bytes)])
    rows.append([f"tables, {plan.table_steps} steps", "", "", "", "", human_bytes(plan.tables_bytes)])
    rows.append(["total", "", "", str(nodes), human_count(parameters), human_bytes(plan.bytes)])
    header = ["component", "backend", "precision", "nodes", "parameters", "size"]
    return table(rows, header=header, right=[3, 4, 5])


def _title(planned: "PlannedComponent") -> str:
    parts = len(planned.parts)
    return planned.component if parts == 1 else f"{planned.component}, {parts} parts"


def _backend(planned: "PlannedComponent") -> str:
    if planned.finish is None:
        return planned.backend or "no builder"
    from qie.engines.backends import BACKENDS

    stays = "graph" if BACKENDS[planned.finish].source == "graph" else "checkpoint"
    return f"{planned.backend}, {stays}" if planned.backend is not None else stays


def _finish(name: str, *, device: int | None, dry_run: bool, as_json: bool) -> None:
    from qie.compiler.planning.resolve import compile_packages
    from qie.engines.bundle.bundle import open_bundle
    from qie.engines.bundle.manifest import titles

    with compile_packages():
        from qie.compiler.packing.finish import finish_bundle

    bundle = open_bundle(name)
    graphs = bundle.manifest.graphs
    if dry_run and as_json:
        found = [{"component": g.component, "part": g.part, "backend": g.backend} for g in graphs]
        return print_json({"components": found})
    if not as_json:
        lacking = ", ".join(f"{name} for {graph.backend}" for name, graph in zip(titles(graphs), graphs, strict=True))
        say(wrap(f"{bundle.path} lacks " + (lacking or "nothing")))
    if dry_run:
        return None
    with Bars(enabled=not as_json) as bars:
        bundle = finish_bundle(bundle, device=device, progress=bars)
    return _print_built(bundle, as_json=as_json)


def _print_built(bundle: "Bundle", *, as_json: bool) -> None:
    from qie.engines.bundle.bundle import bundles_folder
    from qie.engines.bundle.manifest import titles
    from qie.engines.sessions.choose import refusal

    graphs = bundle.manifest.graphs
    unfinished = sorted({graph.backend for graph in graphs})
    waiting = [f"{name} for {graph.backend}" for name, graph in zip(titles(graphs), graphs, strict=True)]
    if as_json:
        return print_json(
            {"bundle": str(bundle.path), "name": bundle.name, "bytes": bundle.bytes, "unfinished": unfinished}
        )
    where = quote(bundle.name if bundle.path.parent == bundles_folder() else str(bundle.path))
    say(f"{bundle.path}: {human_bytes(bundle.bytes)}")
    if bundle.manifest.engines:
        refusals = [reason for engine in bundle.manifest.engines if (reason := refusal(engine)) is not None]
        if not refusals:
            say(f'edit with: qie run photo.png "make it grayscale" --bundle {where}')
        elif all(engine.compute_capability == "cpu" for engine in bundle.manifest.engines):
            say(wrap(f"this machine cannot run it yet: {refusals[0]}"))
        else:
            say("this machine cannot run it; copy the folder to the machine with the GPU, for example with")
            say(f"    rsync -a {quote(str(bundle.path))} MACHINE:")
            say(f'and edit there with: qie run photo.png "make it grayscale" --bundle {quote(bundle.path.name)}')
    if unfinished:
        say(f"on the machine with the GPU, run: qie build --finish {where}")
        say(wrap(f"it adds {', '.join(waiting)}"))
    return None
