"""The command line of qie: the compiler's commands, with the runtime's mounted beside them.

Each command parses, prints the plan, calls one function, prints the outcome. Heavy imports are inside the commands.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qie.compiler.cli.calibrate import calibrate
from qie.engines.cli.run import JsonOption, add_commands, parse_size, print_json
from qie.engines.errors import BackendMissingError, BuildError, QieError
from qie.engines.terminal import Bars, human_bytes, human_count, table

if TYPE_CHECKING:
    from qie.compiler.planning.plan import Plan, PlannedComponent
    from qie.engines.bundle.bundle import Bundle

__all__ = ["app", "main"]

DEFAULT_MODEL = "Qwen/Qwen-Image-Edit-2511"
BUNDLE_NAME = re.compile(r"\w[\w.-]*")

app = typer.Typer(
    name="qie",
    help="Compile Qwen-Image-Edit into engines for a named GPU, and edit images with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="List the recipes, or show one in full.", rich_markup_mode=None)

ModelArgument = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="Checkpoint: a folder in diffusers format, a hub id, or pocket.")
]
GpuOption = Annotated[str, typer.Option("--gpu", help="Recipe: a name of `qie recipes`, or the path of a .toml file.")]
LoraOption = Annotated[
    list[str] | None, typer.Option("--lora", help="LoRA to fuse, PATH or PATH:WEIGHT; may be given several times.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        help="File of `qie calibrate`, for recipes that quantize.", show_default="the recipe's, or the checkpoint's own"
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


def main() -> None:
    """Run the command line; an error of qie's becomes one sentence on stderr and its exit code."""
    try:
        app()
    except QieError as problem:
        _stop(str(problem), problem.exit_code)
    except OSError as problem:
        _stop(f"{problem.filename or 'a file'} cannot be used ({problem.strerror}); check its name and permissions", 2)
    except MemoryError:
        _stop("this machine has not enough memory for that; use a smaller --size, fewer --steps or a smaller model", 2)
    except KeyboardInterrupt:
        _stop("stopped", 130)


def _stop(text: str, code: int) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        import qie

        typer.echo(f"qie {qie.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile Qwen-Image-Edit into engines for a named GPU, and edit images with them."""


@app.command()
def build(
    model: ModelArgument = DEFAULT_MODEL,
    gpu: GpuOption = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the bundle.", show_default="by name, where `qie list` looks")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle.", show_default="MODEL-GPU")] = None,
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    revision: RevisionOption = None,
    finish: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE", help="Build what BUNDLE still lacks, on the machine with its GPU; takes no MODEL."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; needs configs alone.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build a bundle of engines for one GPU from a checkpoint."""
    if finish is not None:
        return _finish(finish, dry_run=dry_run, as_json=as_json)
    plan = _plan(model, gpu, lora, calibration, revision, out, name, weights=not dry_run)
    if dry_run or not as_json:
        _print_plan(plan, as_json=as_json)
    if dry_run:
        return None
    from qie.compiler.packing.pack import build_bundle

    with Bars(enabled=not as_json) as bars:
        bundle = build_bundle(plan, progress=bars)
    return _print_built(bundle, as_json=as_json)


@app.command("plan")
def show_estimate(
    model: ModelArgument = DEFAULT_MODEL,
    gpu: GpuOption = "cpu",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Size of the edit in pixels.", show_default="the model's area")
    ] = None,
    references: Annotated[int, typer.Option(min=1, help="Images that the edit takes.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the recipe's")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the recipe's")] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate a build and an edit from configs alone: memory, disk, time; refuse what cannot fit."""
    plan = _plan(model, gpu, None, None, revision, None, None, weights=False)
    from qie.compiler.cli.plan import describe, facts
    from qie.compiler.planning.estimate import estimate, refusal
    from qie.compiler.planning.workload import workload

    wanted = workload(plan, size=parse_size(size), references=references, steps=steps, guidance=cfg)
    found = estimate(plan, wanted)
    refused = refusal(found)
    if as_json:
        print_json(facts(found, refused))
    else:
        typer.echo(describe(found))
    if refused is not None:
        raise refused


@app.command()
def export(
    model: ModelArgument = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("graphs"),
    gpu: GpuOption = "cpu",
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="With weights, or graphs alone.")] = True,
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the graphs of a checkpoint as ONNX files, for other tools to read."""
    plan = _plan(model, gpu, lora, calibration, revision, out, None, weights=weights)
    from qie.compiler.packing.export import export_graphs

    with Bars(enabled=not as_json) as bars:
        files = export_graphs(plan, weights=weights, progress=bars)
    if as_json:
        return print_json({"files": [str(file) for file in files]})
    for file in files:
        typer.echo(str(file))
    return None


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the recipes."""
    if context.invoked_subcommand is not None:
        return None
    from qie.compiler.recipe.load import load_recipe, recipe_names

    found = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        rows = [
            {
                "name": name,
                "gpu": r.gpu,
                "compute_capability": r.compute_capability,
                "memory_gib": r.memory_gib,
                "backends": list(r.backends),
                "transformer": [r.components.transformer.precision, r.components.transformer.scheme],
            }
            for name, r in found.items()
        ]
        return print_json({"recipes": rows})
    lines = []
    for name, r in found.items():
        transformer = r.components.transformer
        precision = transformer.precision if transformer.scheme == "none" else transformer.scheme
        lines.append(
            [name, r.gpu, r.compute_capability or "-", f"{r.memory_gib:g} GiB", precision, " > ".join(r.backends)]
        )
    header = ["recipe", "GPU", "capability", "memory", "transformer", "backends"]
    typer.echo(table(lines, header=header, right=[3]))
    return None


@recipes_app.command("show", no_args_is_help=True)
def show(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A name of `qie recipes`, or the path of a .toml file.")
    ],
) -> None:
    """Print a recipe with everything that it inherits."""
    from qie.compiler.recipe.load import load_recipe
    from qie.compiler.recipe.schema import to_toml

    typer.echo(to_toml(load_recipe(name)), nl=False)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can build and run, and what to install for the rest."""
    from qie.compiler.doctor import examine
    from qie.engines.records import to_plain

    report = examine()
    if as_json:
        return print_json(to_plain(report))
    machine = report.machine
    gpus = [
        f"{g.name}, compute capability {g.compute_capability}, "
        + (f"{g.memory_gib:g} GiB" if g.memory_gib else "memory shared with the processor")
        + f", driver {g.driver}{f' (CUDA {machine.cuda})' if machine.cuda else ''}"
        for g in machine.gpus
    ]
    facts = [
        ["qie", report.qie],
        ["Python", report.python],
        ["machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB, {machine.system}"],
        ["GPU", "; ".join(gpus) or "none found"],
        ["home", f"{report.home} ({human_bytes(report.free_bytes)} free)"],
    ]
    typer.echo(table(facts) + "\n")
    rows = [[c.what, "yes" if c.ready else "no", ", ".join(c.found) or "-", c.mend or ""] for c in report.abilities]
    typer.echo(table(rows, header=["this machine can", "", "with", "to make it so"]))
    if report.bundles:
        typer.echo("\n" + table([[b.name, b.reason or "runs here"] for b in report.bundles], header=["bundle", ""]))
    return None


app.command("calibrate", no_args_is_help=True)(calibrate)
app.add_typer(recipes_app, name="recipes")
add_commands(app)


def _plan(
    model: str,
    gpu: str,
    loras: list[str] | None,
    calibration: Path | None,
    revision: str | None,
    out: Path | None,
    name: str | None,
    *,
    weights: bool,
) -> "Plan":
    """Resolve a command's arguments."""
    try:
        from qie.compiler.checkpoint.checkpoint import open_checkpoint
        from qie.compiler.checkpoint.lora import open_lora, parse_lora
        from qie.compiler.planning.plan import bundle_name, make_plan
        from qie.compiler.quantization.calibration import find_calibration
        from qie.compiler.recipe.load import load_recipe
    except ModuleNotFoundError as problem:
        raise BackendMissingError(
            f"building needs {problem.name}, which is not installed; run `pip install 'qie[compile]'`"
        ) from problem
    from qie.engines.bundle.bundle import bundles_folder

    if name is not None and not BUNDLE_NAME.fullmatch(name):
        raise BuildError(f"--name is {name!r}, expected letters, digits, dots and dashes; --out names a folder")
    recipe = load_recipe(gpu)
    checkpoint = open_checkpoint(model, revision=revision, weights=weights)
    destination = out or bundles_folder() / (name or bundle_name(checkpoint, gpu))
    return make_plan(
        checkpoint,
        recipe_name=gpu,
        recipe=recipe,
        loras=[open_lora(*parse_lora(text)) for text in loras or []],
        destination=destination,
        calibration=find_calibration(calibration or recipe.calibration, checkpoint.path),
    )


def _finish(name: str, *, dry_run: bool, as_json: bool) -> None:
    """What ``qie build --finish`` does."""
    from qie.compiler.packing.finish import finish_bundle
    from qie.engines.bundle.bundle import open_bundle

    bundle = open_bundle(name)
    lacking = [(graph.component, graph.backend) for graph in bundle.manifest.graphs]
    if dry_run and as_json:
        return print_json({"components": [{"component": c, "backend": b} for c, b in lacking]})
    if not as_json:
        typer.echo(f"{bundle.path} lacks " + (", ".join(f"{c} for {b}" for c, b in lacking) or "nothing"))
    if dry_run:
        return None
    with Bars(enabled=not as_json) as bars:
        bundle = finish_bundle(bundle, progress=bars)
    return _print_built(bundle, as_json=as_json)


def _print_built(bundle: "Bundle", *, as_json: bool) -> None:
    from qie.engines.bundle.bundle import bundles_folder

    lacking = sorted({graph.backend for graph in bundle.manifest.graphs})
    if as_json:
        return print_json(
            {"bundle": str(bundle.path), "name": bundle.name, "bytes": bundle.bytes, "unfinished": lacking}
        )
    where = bundle.name if bundle.path.parent == bundles_folder() else bundle.path
    typer.echo(f"\n{bundle.path}: {human_bytes(bundle.bytes)}")
    if lacking:
        typer.echo(
            f"engines for {', '.join(lacking)} are yet to be built, on the GPU's machine: qie build --finish {where}"
        )
    if bundle.manifest.engines:
        typer.echo(f'edit with: qie run photo.png "make it grayscale" --bundle {where}')
    return None


def _print_plan(plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        return print_json(
            {
                "model": plan.checkpoint.name,
                "revision": plan.checkpoint.revision,
                "pipeline": plan.model.pipeline,
                "recipe": plan.recipe_name,
                "destination": str(plan.destination),
                "bytes": plan.bytes,
                "modulation_bytes": plan.modulation_bytes,
                "tables_bytes": plan.tables_bytes,
                "components": [
                    {
                        "component": c.component,
                        "backend": c.backend,
                        "finish": c.finish,
                        "precision": c.precision,
                        "scheme": c.scheme,
                        "attention": c.attention,
                        "nodes": c.nodes,
                        "parameters": c.parameters,
                        "bytes": c.bytes,
                    }
                    for c in plan.components
                ],
            }
        )
    loras = ", ".join(f"{o.name}:{o.weight:g}" for o in plan.loras) or "none"
    typer.echo(f"{plan.checkpoint.name} ({plan.model.pipeline}) by recipe {plan.recipe_name}, LoRAs: {loras}")
    typer.echo(f"into {plan.destination}\n")
    rows = [
        [
            c.component,
            _backend(c),
            c.computes,
            str(c.nodes),
            human_count(c.parameters),
            human_bytes(c.bytes),
        ]
        for c in plan.components
    ]
    parameters = sum(c.parameters for c in plan.components)
    rows.append(["modulation", "", "", "", "", human_bytes(plan.modulation_bytes)])
    rows.append([f"tables, {plan.table_steps} steps", "", "", "", "", human_bytes(plan.tables_bytes)])
    rows.append(
        ["all", "", "", str(sum(c.nodes for c in plan.components)), human_count(parameters), human_bytes(plan.bytes)]
    )
    header = ["component", "backend", "precision", "nodes", "parameters", "weights"]
    typer.echo(table(rows, header=header, right=[3, 4, 5]))
    kept = [c for c in plan.components if c.finish is not None]
    if kept:
        typer.echo(
            f"\n{kept[0].finish} builds on the machine with the GPU only ({plan.recipe.gpu}): the graphs stay in the "
            f"bundle, {human_bytes(sum(c.bytes for c in kept))}, for `qie build --finish` there"
        )
    return None


def _backend(part: "PlannedComponent") -> str:
    if part.finish is None:
        return part.backend or "no builder"
    return f"{part.backend}, graph" if part.backend is not None else "graph"
