"""The commands of the thin runtime: run, inspect, list, rm. Each parses, calls one function, prints the outcome.

Heavy imports are inside the commands, so that ``qie --help`` costs nothing.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qie.engines.errors import BundleError, RequestError
from qie.engines.terminal import Bars, ago, human_bytes, human_count, table

if TYPE_CHECKING:
    from qie.engines.bundle.bundle import Bundle
    from qie.engines.bundle.manifest import EngineRecord
    from qie.engines.editing.editor import Editor
    from qie.engines.editing.request import Edit

__all__ = ["JsonOption", "add_commands", "parse_size", "print_json"]

BundleOption = Annotated[
    str | None, typer.Option("--bundle", help="Bundle to use, by name or folder.", show_default="the newest")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def add_commands(app: typer.Typer) -> None:
    """Add the runtime's commands to ``app``."""
    app.command(no_args_is_help=True)(run)
    app.command(no_args_is_help=True)(inspect)
    app.command("list")(list_bundles)
    app.command("rm", no_args_is_help=True)(rm)


def run(
    words: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE... INSTRUCTION", help="One to three images, then what to change, in words."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="File to write: .png, .jpg or .webp.", show_default="IMAGE-edited.png"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="drawn")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the recipe's")] = None,
    cfg: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 turns guidance off and halves the time.", show_default="the recipe's"),
    ] = None,
    negative: Annotated[str, typer.Option(help="What guidance steers away from.", show_default="one space")] = " ",
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of the result in pixels.", show_default="the model's area"),
    ] = None,
    match_input: Annotated[
        bool, typer.Option("--match-input", help="Bring the result to the last image's own size.")
    ] = False,
    num_images: Annotated[int, typer.Option(min=1, help="Results to make, with consecutive seeds.")] = 1,
    bundle: BundleOption = None,
    as_json: JsonOption = False,
) -> None:
    """Edit images by an instruction: qie run photo.png "make the sky pink"."""
    *paths, instruction = words
    if not paths or _is_file(instruction):
        raise RequestError(
            f"{instruction!r} comes last, expected an instruction there; give the images first, then what to change, "
            "as `qie run --help` shows"
        )
    outputs = _outputs(out, Path(paths[-1]), num_images)
    wanted = parse_size(size)

    from qie.engines.editing.editor import Editor
    from qie.engines.editing.request import Request
    from qie.engines.inputs.image import check_output, load_image, save_image

    for output in outputs:
        check_output(output)
    sources = [load_image(Path(path)) for path in paths]
    editor = Editor(bundle, residency="sequential")  # one edit needs each engine once
    request = Request(
        images=[source.image for source in sources],
        instructions=[instruction],
        seeds=None if seed is None and num_images == 1 else _seeds(seed, num_images),
        negative=negative,
        steps=steps,
        guidance=cfg,
        size=wanted,
        match_input=match_input,
    )
    with Bars(enabled=not as_json) as bars:
        edit = editor.edit(request, progress=bars)
    for image, output in zip(edit.images, outputs, strict=True):
        save_image(image, output)
    notes = [f"{path}: {note}" for path, s in zip(paths, sources, strict=True) for note in s.notes] + list(edit.notes)
    _report_run(editor, edit, outputs, notes, negative, as_json)


def inspect(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Name or folder of a bundle.")],
    check: Annotated[bool, typer.Option("--verify", help="Read every file and compare it with its digest.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds, and whether its engines run on this machine."""
    from qie.engines.bundle.bundle import open_bundle, verify
    from qie.engines.records import to_plain
    from qie.engines.sessions.choose import refusal

    opened = open_bundle(bundle)
    if check:
        with Bars(enabled=not as_json) as bars:
            verify(opened, progress=lambda done, total: bars("verify", done, total))
    reasons = [refusal(engine) for engine in opened.manifest.engines]
    if as_json:
        engines = [
            {"component": e.component, "backend": e.backend, "runs_here": reason is None, "reason": reason}
            for e, reason in zip(opened.manifest.engines, reasons, strict=True)
        ]
        return print_json(
            {
                "path": str(opened.path),
                "bytes": opened.bytes,
                "verified": check,
                "engines": engines,
                "manifest": to_plain(opened.manifest),
            }
        )
    typer.echo(_describe(opened, reasons))
    if check:
        typer.echo("\nevery file is as it was built")


def list_bundles(as_json: JsonOption = False) -> None:
    """List the bundles that have a name."""
    from qie.engines.bundle.bundle import bundles, bundles_folder, open_bundle
    from qie.engines.errors import QieError

    rows: list[dict[str, Any]] = []
    for path in bundles():
        row: dict[str, Any] = {"name": path.name, "built": (path / "manifest.json").stat().st_mtime}
        try:
            opened = open_bundle(str(path))
            manifest = opened.manifest
            row |= {
                "model": manifest.model.name,
                "recipe": manifest.recipe.name,
                "bytes": opened.bytes,
                "problem": None,
            }
        except QieError as problem:
            row |= {"model": "", "recipe": "", "bytes": 0, "problem": str(problem)}
        rows.append(row)
    if as_json:
        return print_json({"folder": str(bundles_folder()), "bundles": rows})
    if not rows:
        typer.echo(f"no bundles in {bundles_folder()}; make one with `qie build pocket --gpu cpu`")
        return None
    lines = [
        [
            r["name"],
            r["model"],
            r["recipe"],
            human_bytes(r["bytes"]),
            ago(r["built"]),
            "damaged" if r["problem"] else "",
        ]
        for r in rows
    ]
    typer.echo(table(lines, header=["bundle", "model", "recipe", "size", "built", ""], right=[3]))
    for row in rows:
        if row["problem"]:
            typer.echo(f"\n{row['problem']}")
    return None


def rm(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="Name or folder of a bundle.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a bundle."""
    from qie.engines.bundle.bundle import locate, remove_bundle

    path = locate(bundle).resolve()
    try:
        if not yes and not typer.confirm(f"delete {path}?"):
            typer.echo("nothing deleted")
            return
    except typer.Abort:
        typer.echo()
        raise BundleError(f"{path} is not deleted: nobody answered; run `qie rm {bundle} --yes`") from None
    remove_bundle(path)
    typer.echo(f"deleted {path}")


def _outputs(out: Path | None, source: Path, count: int) -> list[Path]:
    """A file for each result; without a name of the user's, one that does not exist yet."""
    if out is not None:
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{n}") for n in range(1, count + 1)]
    names: list[Path] = []
    number = 1
    while len(names) < count:
        candidate = Path(f"{source.stem}-edited.png" if number == 1 else f"{source.stem}-edited-{number}.png")
        if not candidate.exists():
            names.append(candidate)
        number += 1
    return names


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file's name can be
        return False


def _seeds(seed: int | None, count: int) -> list[int]:
    import secrets

    first = secrets.randbelow(2**32 - count) if seed is None else seed
    return [first + n for n in range(count)]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of ``1024x768``.

    Raises:
        RequestError: it is something else.
    """
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise RequestError(f"--size is {text!r}, expected width x height in pixels; give one such as 1024x768")
    return int(match[1]), int(match[2])


def _report_run(
    editor: "Editor", edit: "Edit", outputs: list[Path], notes: list[str], negative: str, as_json: bool
) -> None:
    guided = edit.guidance > 1
    if as_json:
        return print_json(
            {
                "images": [
                    {"path": str(path), "seed": seed, "width": image.width, "height": image.height}
                    for path, image, (_, seed) in zip(outputs, edit.images, edit.samples, strict=True)
                ],
                "instruction": edit.samples[0][0],
                "negative": negative if guided else None,
                "bundle": str(editor.bundle.path),
                "model": editor.model.name,
                "made_at": {"width": edit.size.width, "height": edit.size.height},
                "steps": edit.steps,
                "guidance": edit.guidance if guided else None,
                "about": editor.model.about,
                "notes": notes,
                "seconds": {stage: round(s, 4) for stage, s in edit.seconds.items()},
            }
        )
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if editor.model.about:
        typer.echo(f"{editor.model.name}: {editor.model.about}", err=True)
    guidance = f"guidance {edit.guidance:g} away from {negative!r}" if guided else "no guidance"
    typer.echo(
        f"{editor.model.name} ({editor.bundle.name}), {edit.size}, {edit.steps} steps, {guidance}, "
        f"{sum(edit.seconds.values()):.2f} s",
        err=True,
    )
    for path, (_, seed) in zip(outputs, edit.samples, strict=True):
        typer.echo(f"seed {seed}: ", err=True, nl=False)
        typer.echo(str(path))
    return None


def _precision(engine: "EngineRecord") -> str:
    """What an engine computes in, and in how many of its linears it is something less."""
    record = engine.quantization
    if record is None:
        return engine.precision
    fused = "" if record.fused is None else f" ({record.fused} fused)"
    return f"{engine.precision}, {record.scheme} in {record.quantized}/{record.linears} linears{fused}"


def _describe(bundle: "Bundle", reasons: list[str | None]) -> str:
    manifest = bundle.manifest
    model, limits, defaults = manifest.model, manifest.limits, manifest.defaults
    loras = ", ".join(f"{lora.name}:{lora.weight:g}" for lora in manifest.loras) or "none"
    facts = [
        ["bundle", str(bundle.path)],
        ["size", human_bytes(bundle.bytes)],
        ["made by", f"qie {manifest.qie}"],
        ["model", model.name + (f" at {model.revision}" if model.revision else "")],
        *([["about", model.about]] if model.about else []),
        ["pipeline", model.pipeline],
        ["LoRAs", loras],
        ["recipe", f"{manifest.recipe.name} ({manifest.recipe.sha256[:12]})"],
        ["sizes", ", ".join(str(size) for size in limits.buckets)],
        ["limits", f"sides {limits.min_side} to {limits.max_side}, at most {limits.max_area:,} pixels, "
                   f"{limits.references_max} images, {limits.batch_max} results a run"],
        ["defaults", f"{defaults.steps} steps, guidance {defaults.guidance:g}, {defaults.noise} noise, "
                     f"{defaults.residency}"],
        ["schedules", f"{len(manifest.schedules)} precomputed"],
    ]  # fmt: skip
    engines = [
        [
            e.component,
            f"{e.backend}/{e.compute_capability}",
            e.backend_version,
            _precision(e),
            human_count(e.parameters),
            human_bytes(sum(f.bytes for f in e.files)),
            "-" if e.activation_bytes is None else human_bytes(e.activation_bytes),
            f"{e.build_seconds:.1f} s",
            human_bytes(e.build_peak_bytes),
            "yes" if reason is None else "no",
        ]
        for e, reason in zip(manifest.engines, reasons, strict=True)
    ]
    header = ["component", "target", "version", "precision", "parameters", "size", "activations", "built in",
              "peak memory", "runs here"]  # fmt: skip
    parts = [table(facts), table(engines, header=header, right=[4, 5, 6, 7, 8])]
    shapes = [
        [e.component if number == 0 else "", p.input, *(" x ".join(map(str, dims)) for dims in (p.min, p.opt, p.max))]
        for e in manifest.engines
        for number, p in enumerate(e.profiles)
    ]
    if shapes:
        parts.append(table(shapes, header=["shapes of", "input", "smallest", "tuned for", "largest"]))
    structures = [_structure(bundle, e) for e in manifest.engines if e.structure is not None]
    if structures:
        header = ["structure of", "layers", "kernels", "attention", "fused", "largest buffer", "allocated in a run"]
        parts.append(table(structures, header=header, right=[1, 2, 3, 4, 5, 6]))
    waiting = [
        [g.component, g.backend, g.precision, human_count(g.parameters), human_bytes(sum(f.bytes for f in g.files))]
        for g in manifest.graphs
    ]
    if waiting:
        header = ["graph of", "to be built for", "precision", "parameters", "size"]
        parts.append(table(waiting, header=header, right=[3, 4]))
        parts.append(f"on the machine with the GPU: qie build --finish {bundle.path}")
    text = "\n\n".join(parts)
    told = dict.fromkeys(reason for reason in reasons if reason)
    return "\n".join([text, *(f"\n{reason}" for reason in told)])


def _structure(bundle: "Bundle", engine: "EngineRecord") -> list[str]:
    """A row about what an engine is made of; "-" where it does not say."""
    assert engine.structure is not None
    found = json.loads((bundle.path / engine.structure.path).read_text(encoding="utf-8"))
    kernels, buffer = found["kernels"], found["largest_buffer_bytes"]
    counts = [
        len(found["layers"]),
        None if kernels is None else len(kernels),
        found["attention"]["layers"],
        found["attention"]["fused"],
        None if buffer is None else human_bytes(buffer),
        found["allocations"],
    ]
    return [engine.component, *("-" if count is None else str(count) for count in counts)]


def print_json(value: Any) -> None:
    """Print plain data as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
