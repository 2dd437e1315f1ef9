"""``qie calibrate``: statistics for quantization, and which linears to exclude from it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from qie.compiler.cli.options import RevisionOption
from qie.engines.cli.options import JsonOption, print_json
from qie.engines.errors import CalibrationError
from qie.engines.terminal import Bars, human_bytes, table

if TYPE_CHECKING:
    from qie.compiler.quantization.sensitivity import Sensitivity

__all__ = ["CalibrateCommand", "calibrate"]


class CalibrateCommand(TyperCommand):
    """Fills the help's ``{components}`` and ``{schemes}`` from the recipe's schema, which only this help imports."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help with the choices in it."""
        from qie.compiler.recipe.schema import QUANTIZABLE, SchemeName

        schemes = [name for name in get_args(SchemeName) if name != "none"]
        choices = {"components": " or ".join(QUANTIZABLE), "schemes": ", ".join(schemes)}
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text is not None:
                vars(parameter)["help"] = text.format(**choices)
        super().format_help(ctx, formatter)


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder in diffusers format, Hugging Face Hub id, or pocket.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of images like those to be edited.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("calibration.npz"),
    instructions: Annotated[
        Path | None,
        typer.Option(help="Text file with one instruction a line.", show_default="a few of many kinds"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=4096, help="Number of forward passes to observe.")] = 32,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also rank the linears by error, and choose which to exclude.")
    ] = False,
    component: Annotated[str, typer.Option(help="Component to rank: {components}.")] = "transformer",
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="Scheme to rank for: {schemes}; repeatable.", show_default="fp8"),
    ] = None,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Relative L2 error budget of the ranking.")] = 0.02,
    ranked: Annotated[
        Path | None, typer.Option(help="JSON file for the ranking.", show_default="beside the calibration")
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the scales that FP8 and INT8 need.

    Edits of your images run through the model block by block, in float32 and without PyTorch.
    """
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.checkpoint.checkpoint import open_checkpoint
        from qie.compiler.checkpoint.tokenizer import check_tokenizer
        from qie.compiler.planning.checks import check_download
        from qie.compiler.quantization.calibration import write_calibration
        from qie.compiler.quantization.samples import INSTRUCTIONS, draw_samples, read_images
        from qie.compiler.quantization.schemes import SCHEMES
        from qie.compiler.quantization.sensitivity import measure
        from qie.compiler.recipe.schema import QUANTIZABLE

    unknown = [name for name in scheme or () if name not in SCHEMES]
    if unknown:
        raise CalibrationError(_choices(unknown[0], SCHEMES), option="scheme")
    schemes = [name for name in SCHEMES if name in (scheme or ["fp8"])]
    quantizable = next((name for name in QUANTIZABLE if name == component), None)
    if quantizable is None:
        raise CalibrationError(_choices(component, QUANTIZABLE), option="component")
    texts = INSTRUCTIONS if instructions is None else _lines(instructions)
    drawn = draw_samples(read_images(images), texts, samples)
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    check_tokenizer(checkpoint)
    check_download(checkpoint, destination=out, output_bytes=0)
    with Bars(enabled=not as_json) as bars:
        calibration, rankings = measure(
            checkpoint.with_weights(progress=lambda done, total: bars("download", done, total)),
            drawn,
            component=quantizable,
            schemes=schemes if sensitivity else (),
            budget=budget,
            progress=bars,
        )
    write_calibration(calibration, out)
    ranking_facts = [ranking.facts() for ranking in rankings]
    if rankings:
        from qie.engines.files import replacing

        path = ranked or out.with_suffix(".sensitivity.json")
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(ranking_facts, indent=1) + "\n", encoding="utf-8")
    linears = len(calibration.amax)
    if as_json:
        return print_json(
            {"calibration": str(out), "samples": samples, "linears": linears, "sensitivity": ranking_facts}
        )
    typer.echo(f"{out}: {linears} linears, {calibration.samples} samples, {human_bytes(out.stat().st_size)}")
    typer.echo(f"build with: qie build {calibration.name} --gpu l40s --calibration {out}")
    for ranking in rankings:
        typer.echo(describe(ranking))
    return None


def _choices(value: str, choices: Iterable[str]) -> str:
    return f"{value!r} cannot be ranked, expected one of {', '.join(choices)}; choose one of these"


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(lines):
        raise CalibrationError(f"{path} has no instruction; write one a line", option="instructions")
    return [line for line in lines if line]


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
