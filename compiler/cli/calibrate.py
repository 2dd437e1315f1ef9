"""``qie calibrate``: statistics for quantization, and which linears it must spare."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qie.engines.cli.run import JsonOption, print_json
from qie.engines.errors import CalibrationError
from qie.engines.files import replacing
from qie.engines.terminal import Bars, human_bytes, table

if TYPE_CHECKING:
    from qie.compiler.quantization.calibration import Calibration
    from qie.compiler.quantization.sensitivity import Sensitivity

__all__ = ["calibrate"]


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint: a folder, a hub id, or pocket.")],
    images: Annotated[Path, typer.Option(help="Folder of pictures like those that will be edited.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("calibration.npz"),
    instructions: Annotated[
        Path | None,
        typer.Option(help="Text file with one instruction a line.", show_default="a few of many kinds"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=4096, help="Forward passes to watch.")] = 32,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also rank the linears, and choose which to exclude.")
    ] = False,
    component: Annotated[str, typer.Option(help="Which to rank: transformer or language.")] = "transformer",
    scheme: Annotated[
        list[str] | None, typer.Option(help="Quantization to rank for; several times.", show_default="fp8")
    ] = None,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Relative L2 that quantization may bring.")] = 0.02,
    ranked: Annotated[
        Path | None, typer.Option(help="JSON file for the ranking.", show_default="beside the calibration")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run samples of edits through a model, block by block, and write what quantization must know of it."""
    from qie.compiler.checkpoint.checkpoint import open_checkpoint
    from qie.compiler.checkpoint.tokenizer import check_tokenizer
    from qie.compiler.quantization.calibration import write_calibration
    from qie.compiler.quantization.samples import INSTRUCTIONS, draw_samples, read_images
    from qie.compiler.quantization.schemes import SCHEMES
    from qie.compiler.quantization.sensitivity import measure
    from qie.compiler.recipe.schema import QUANTIZABLE

    unknown = [name for name in scheme or () if name not in SCHEMES]
    if unknown:
        raise CalibrationError(f"--scheme is {unknown[0]!r}, expected one of {', '.join(SCHEMES)}")
    schemes = [name for name in SCHEMES if name in (scheme or ["fp8"])]
    quantizable = next((name for name in QUANTIZABLE if name == component), None)
    if quantizable is None:
        raise CalibrationError(f"--component is {component!r}, expected one of {', '.join(QUANTIZABLE)}")
    asked = INSTRUCTIONS if instructions is None else _lines(instructions)
    drawn = draw_samples(read_images(images), asked, samples)
    checkpoint = open_checkpoint(model, revision=revision)
    check_tokenizer(checkpoint)
    with Bars(enabled=not as_json) as bars:
        found, rankings = measure(
            checkpoint,
            drawn,
            component=quantizable,
            schemes=schemes if sensitivity else (),
            budget=budget,
            progress=bars,
        )
    write_calibration(found, out)
    evidence = [ranking.facts() for ranking in rankings]
    if rankings:
        path = ranked or out.with_suffix(".sensitivity.json")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(
            {
                "calibration": str(out),
                "samples": samples,
                "linears": len(found.amax),
                "sensitivity": evidence,
            }
        )
        return
    typer.echo(_said(found, out))
    for ranking in rankings:
        typer.echo(describe(ranking))


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise CalibrationError(f"{path} has no instruction; write one a line")
    return [line for line in lines if line]


def _said(found: "Calibration", out: Path) -> str:
    return (
        f"{out}: {len(found.amax)} linears over {found.samples} samples, {human_bytes(out.stat().st_size)}\n"
        f"build with: qie build {found.name} --gpu l40s --calibration {out}"
    )


def describe(ranking: "Sensitivity") -> str:
    """The ranking as a person reads it: the worst linears, and the lines of a recipe."""
    worst = sorted(ranking.errors, key=lambda name: ranking.errors[name], reverse=True)[:12]
    rows = [[name, f"{ranking.errors[name]:.4f}", "excluded" if name in ranking.exclude else ""] for name in worst]
    excluded = human_bytes(sum(ranking.bytes[name] for name in ranking.exclude))
    return "\n".join(
        [
            "",
            table(rows, header=["quantized alone", "error", ""], right=[1]),
            "",
            f"{ranking.component}, {ranking.scheme}: with all {len(ranking.errors)} linears quantized the error "
            f"is {ranking.all_quantized_error:.4f}; with {len(ranking.exclude)} of them excluded ({excluded}) it is "
            f"{ranking.error_after_exclusion:.4f}, the budget being {ranking.budget:g}",
        ]
    )
