"""``qie list``, ``qie inspect`` and ``qie rm``: the bundles on this machine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qie.engines.cli.options import BundleArgument, JsonOption, print_json
from qie.engines.errors import BundleError, QieError
from qie.engines.terminal import (
    Bars,
    ago,
    human_bytes,
    human_count,
    human_memory,
    human_seconds,
    printable,
    say,
    table,
    wrap,
)

if TYPE_CHECKING:
    from qie.engines.bundle.bundle import Bundle
    from qie.engines.bundle.manifest import EngineRecord, GraphRecord, Manifest
    from qie.engines.bundle.specs import Size

__all__ = ["inspect", "list_bundles", "rm"]


def inspect(
    bundle: BundleArgument,
    check: Annotated[bool, typer.Option("--verify", help="Read every file and compare its sha256.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the content of a bundle."""
    from qie.engines.bundle.bundle import open_bundle, verify
    from qie.engines.bundle.sealed import seal
    from qie.engines.records import to_plain
    from qie.engines.sessions.choose import refusal

    opened = open_bundle(bundle)
    if check:
        with Bars(enabled=not as_json) as bars:
            verify(opened, progress=lambda done, total: bars("verify", done, total))
    reasons = [refusal(engine) for engine in opened.manifest.engines]
    if as_json:
        engines = [
            {
                "component": e.component,
                "part": e.part,
                "backend": e.backend,
                "runs_here": reason is None,
                "reason": reason,
            }
            for e, reason in zip(opened.manifest.engines, reasons, strict=True)
        ]
        return print_json(
            {
                "path": str(opened.path),
                "bytes": opened.bytes,
                "verified": check,
                "engines": engines,
                "manifest": seal(to_plain(opened.manifest)),
            }
        )
    say(_describe(opened, reasons))
    if check:
        say("\nall files match their sha256")
    return None


def list_bundles(as_json: JsonOption = False) -> None:
    """List the bundles by name."""
    from qie.engines.bundle.bundle import bundles, bundles_folder, open_bundle
    from qie.engines.bundle.manifest import MANIFEST
    from qie.engines.folders import leftovers

    rows: list[dict[str, Any]] = []
    for path in bundles():
        row: dict[str, Any] = {"name": path.name, "built": 0.0}
        try:
            row["built"] = (path / MANIFEST).stat().st_mtime
            opened = open_bundle(path)
            model, recipe = opened.manifest.model.name, opened.manifest.recipe.name
            row |= {"model": model, "recipe": recipe, "bytes": opened.bytes, "problem": None}
        except (QieError, OSError) as problem:
            row |= {"model": "", "recipe": "", "bytes": 0, "problem": str(problem)}
        rows.append(row)
    if as_json:
        return print_json({"folder": str(bundles_folder()), "bundles": rows})
    left = leftovers(bundles_folder())
    if left:
        say(f"{len(left)} left by stopped builds or deletions; `qie clean` shows them", err=True)
    if not rows:
        say(f"no bundles in {bundles_folder()}; build one with `qie build pocket --gpu cpu`")
        return None
    lines = [
        [r["name"], r["model"], r["recipe"], "damaged" if r["problem"] else human_bytes(r["bytes"]), ago(r["built"])]
        for r in rows
    ]
    header = ["bundle", "model", "recipe", "size", "built"]
    say(table(lines, header=header, right=[3], notes=[r["problem"] for r in rows]))
    return None


def rm(
    bundle: BundleArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete a bundle."""
    from qie.engines.bundle.bundle import locate, remove_bundle

    path = locate(bundle)
    try:
        if not yes and not typer.confirm(printable(f"delete {path}?")):
            say("nothing deleted")
            return
    except typer.Abort:
        say()
        raise BundleError(f"{path} is not deleted, since nobody answered; run `qie rm {bundle} --yes`") from None
    later = "" if remove_bundle(path) else "; its files are deleted when the last edit with them ends"
    say(f"deleted {path}{later}")


def _describe(bundle: "Bundle", reasons: list[str | None]) -> str:
    """The bundle as tables: facts, engines, how they were built, their shapes and structure, graphs without engines."""
    from qie.engines.bundle.manifest import titles

    manifest = bundle.manifest
    named = titles(manifest.engines)
    sections = [_facts(bundle), _engines(manifest.engines, named, reasons), _builds(manifest.engines, named)]
    shapes = [
        [name if number == 0 else "", p.input, *(" x ".join(map(str, dims)) for dims in (p.min, p.opt, p.max))]
        for e, name in zip(manifest.engines, named, strict=True)
        for number, p in enumerate(e.profiles)
    ]
    if shapes:
        sections.append(table(shapes, header=["shapes of", "input", "min", "opt", "max"]))
    described = [(e, name) for e, name in zip(manifest.engines, named, strict=True) if e.structure is not None]
    structures = [_structure(bundle, e, name) for e, name in described]
    if structures:
        header = ["structure of", "layers", "kernels", "attention", "fused", "largest buffer", "run-time allocations"]
        sections.append(table(structures, header=header, right=range(1, 7)))
    if manifest.graphs:
        sections.append(_graphs(manifest.graphs, titles(manifest.graphs)))
        sections.append(wrap(f"on the machine with the GPU, run: qie build --finish {bundle.path}"))
    sections += [wrap(reason) for reason in dict.fromkeys(reasons) if reason]
    return "\n\n".join(sections)


def _facts(bundle: "Bundle") -> str:
    manifest = bundle.manifest
    model, limits, defaults = manifest.model, manifest.limits, manifest.defaults
    rows = [
        ["bundle", str(bundle.path)],
        ["size", human_bytes(bundle.bytes)],
        ["built by", f"qie {manifest.qie}"],
        ["model", model.name + (f" at {model.revision}" if model.revision else "")],
        *([["about", model.about]] if model.about else []),
        ["pipeline", model.pipeline],
        ["LoRAs", ", ".join(f"{lora.name}:{lora.weight:g}" for lora in manifest.loras) or "none"],
        ["recipe", f"{manifest.recipe.name} (sha256 {manifest.recipe.sha256[:12]})"],
        ["sizes", ", ".join(str(size) for size in limits.buckets)],
        ["limits", f"sides from {limits.min_side} to {limits.max_side} pixels, at most {limits.max_area:,} pixels, "
                   f"{limits.references_max} input images, {limits.batch_max} results in a run"],
        ["defaults", f"{defaults.steps} steps, guidance {defaults.guidance:g}, {defaults.noise} noise, "
                     f"{defaults.residency} engines"
                     + (f", {defaults.specialization} specialization" if defaults.specialization != "none" else "")],
        ["schedules", _schedules(manifest)],
    ]  # fmt: skip
    return table(rows)


def _schedules(manifest: "Manifest") -> str:
    """The schedules with tables, and whether others can be computed."""
    from qie.engines.inputs.stored_schedules import stored_schedules

    steps: dict[tuple[Size, ...], list[str]] = {}
    for schedule in stored_schedules(manifest):
        steps.setdefault(schedule.sizes, []).append(str(schedule.steps))
    found = [f"{', '.join(counts)} steps at {', '.join(map(str, sizes))}" for sizes, counts in steps.items()]
    if manifest.model.modulation.file is not None:
        found.append("any other from the modulation weights")
    return "; ".join(found) or "none"


def _engines(engines: Sequence["EngineRecord"], names: Sequence[str], reasons: Sequence[str | None]) -> str:
    rows = [
        [
            name,
            f"{e.backend}/{e.compute_capability}",
            _precision(e),
            human_count(e.parameters),
            human_bytes(sum(f.bytes for f in e.files)),
            "yes" if reason is None else "no",
        ]
        for e, name, reason in zip(engines, names, reasons, strict=True)
    ]
    header = ["component", "target", "precision", "parameters", "size", "runs here"]
    return table(rows, header=header, right=[3, 4])


def _builds(engines: Sequence["EngineRecord"], names: Sequence[str]) -> str:
    rows = [
        [
            name,
            f"{e.backend} {e.backend_version}",
            human_seconds(e.build_seconds),
            human_memory(e.build_peak_bytes),
            "-" if e.activation_bytes is None else human_memory(e.activation_bytes),
        ]
        for e, name in zip(engines, names, strict=True)
    ]
    header = ["component", "built with", "build time", "peak memory", "activations"]
    return table(rows, header=header, right=[2, 3, 4])


def _graphs(graphs: Sequence["GraphRecord"], names: Sequence[str]) -> str:
    rows = [
        [name, g.backend, g.precision, human_count(g.parameters), human_bytes(sum(f.bytes for f in g.files))]
        for g, name in zip(graphs, names, strict=True)
    ]
    return table(rows, header=["source of", "to build for", "precision", "parameters", "size"], right=[3, 4])


def _precision(engine: "EngineRecord") -> str:
    """The precision of an engine, and how many of its linears are quantized."""
    record = engine.quantization
    if record is None:
        return engine.precision
    fused = "" if record.fused is None else f" ({record.fused} fused)"
    return f"{engine.precision}, {record.scheme} in {record.quantized}/{record.linears} linears{fused}"


def _structure(bundle: "Bundle", engine: "EngineRecord", name: str) -> list[str]:
    """A row about the layers of the engine that is called ``name``; "-" for what the backend does not report."""
    from qie.engines.bundle.structure import read_structure

    found = read_structure(bundle, engine)
    buffer = None if found.largest_buffer_bytes is None else human_memory(found.largest_buffer_bytes)
    types = f" in {', '.join(found.fused_types)}" if found.fused and found.fused_types else ""
    fused = None if found.fused is None else f"{found.fused}{types}"
    counts = [found.layers, found.kernels, found.attention, fused, buffer, found.allocations]
    return [name, *("-" if count is None else str(count) for count in counts)]
