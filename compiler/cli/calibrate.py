"""``qie calibrate``: statistics for quantization, and which linears to exclude from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import typer

from qie.compiler.cli.options import RevisionOption
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.recipe.quantizable import QUANTIZABLE, SchemeName
from qie.engines.bundle.manifest import Component
from qie.engines.cli.options import JsonOption, print_json
from qie.engines.errors import CalibrationError
from qie.engines.files import is_writable
from qie.engines.terminal import Bars, human_bytes, say

__all__ = ["calibrate"]

Name = TypeVar("Name", bound=str)

SCHEME_NAMES = ", ".join(name for name in get_args(SchemeName) if name != "none")


def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder in diffusers format, Hugging Face Hub id, or pocket.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of images like those to be edited.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("calibration.npz"),
    instructions: Annotated[
        Path | None,
        typer.Option(
            help="Text file with one instruction per line.", show_default=f"{len(INSTRUCTIONS)} built-in instructions"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=4096, help="Number of forward passes to observe.")] = 32,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="RECIPE", help="Recipe to measure for.", show_default="all schemes, for every recipe"
        ),
    ] = None,
    side: Annotated[
        int | None,
        typer.Option(min=64, help="Reduce images to the area of a square with this side.", show_default="the model's"),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also rank the linears by error, and choose which to exclude.")
    ] = False,
    component: Annotated[str, typer.Option(help=f"Component to rank: {' or '.join(QUANTIZABLE)}.")] = "transformer",
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help=f"Scheme to rank for: {SCHEME_NAMES}; repeatable.", show_default="fp8"),
    ] = None,
    budget: Annotated[float, typer.Option(min=0, max=1, help="Relative L2 error budget of the ranking.")] = 0.02,
    ranking: Annotated[
        Path | None, typer.Option(help="JSON file for the ranking.", show_default="beside the calibration")
    ] = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the scales that FP8 and INT8 need.

    `qie build` does this itself where there is no calibration, with fewer samples and without a ranking.

    Runs edits of your images through the model block by block, in float32 and without PyTorch.
    """
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.checkpoint.checkpoint import open_checkpoint
        from qie.compiler.planning.calibration import calibration_model
        from qie.compiler.planning.checks import check_download
        from qie.compiler.quantization.calibration import read_calibration
        from qie.compiler.quantization.measure import calibrate_model
        from qie.compiler.quantization.samples import draw_samples, read_images
        from qie.compiler.quantization.schemes import ALL_SCHEMES, SCHEMES
        from qie.compiler.quantization.sensitivity import describe

    _check_file(out, "out")
    ranking = ranking or out.with_suffix(".sensitivity.json")
    if sensitivity:
        _check_file(ranking, "ranking")
        _check_ranking(ranking)
    if sensitivity and ranking.absolute() == out.absolute():
        raise CalibrationError(f"{ranking} is the calibration file too; name another one", option="ranking")
    if out.exists():
        read_calibration(out)  # nothing but a calibration is replaced
    names = [_checked(name, SCHEMES, "scheme") for name in scheme or ["fp8"]]
    quantizable = _checked(component, QUANTIZABLE, "component")
    measured = _schemes_of(recipe) if recipe is not None else ALL_SCHEMES
    if sensitivity:
        measured = {**measured, quantizable: (*measured.get(quantizable, ()), *names)}
    texts = INSTRUCTIONS if instructions is None else _lines(instructions)
    drawn = draw_samples(read_images(images, samples), texts, samples)
    checkpoint = open_checkpoint(model, revision=revision, weights=False)
    if side is not None:
        checkpoint = replace(checkpoint, model=calibration_model(checkpoint.model, side * side))
    check_download(checkpoint, destination=out, output_bytes=0)
    with Bars(enabled=not as_json) as bars:
        calibration, rankings = calibrate_model(
            checkpoint,
            drawn,
            out,
            component=quantizable,
            schemes=[name for name in SCHEMES if name in names] if sensitivity else (),
            measured=measured,
            budget=budget,
            ranking=ranking,
            progress=bars,
        )
    linears = len(calibration.amax)
    if as_json:
        facts = [one.facts() for one in rankings]
        return print_json({"calibration": str(out), "samples": samples, "linears": linears, "sensitivity": facts})
    say(f"{out}: {linears} linears, {calibration.samples} samples, {human_bytes(out.stat().st_size)}")
    say(f"build with: qie build {calibration.name} --gpu l40s --calibration {out}")
    for one in rankings:
        say(describe(one))
    return None


def _check_file(path: Path, option: str) -> None:
    """Check that a file can be written, before work is spent on it."""
    if not is_writable(path):
        raise CalibrationError(f"{path} cannot be written; name a file in an existing folder", option=option)


def _check_ranking(path: Path) -> None:
    """Check that no file is there but an earlier ranking: nothing else is replaced."""
    if not path.exists():
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        earlier = isinstance(rows, list) and all("all_quantized_error" in row and "errors" in row for row in rows)
    except (ValueError, TypeError, RecursionError):
        earlier = False
    if not earlier:
        raise CalibrationError(f"{path} is not a ranking and would be lost; choose another file", option="ranking")


def _checked(name: str, table: Mapping[Name, object], option: str) -> Name:
    """``name`` as a key of ``table``."""
    key = next((key for key in table if key == name), None)
    if key is None:
        raise CalibrationError(
            f"unknown {option} {name!r}, expected one of {', '.join(table)}; choose one", option=option
        )
    return key


def _schemes_of(recipe: str) -> Mapping[Component, Sequence[SchemeName]]:
    """The schemes of a recipe, each for every component: the file may serve other recipes."""
    from qie.compiler.planning.calibration import needed_schemes
    from qie.compiler.quantization.schemes import ALL_SCHEMES
    from qie.compiler.recipe.load import load_recipe

    resolved = load_recipe(recipe)
    if not resolved.quantizes:
        raise CalibrationError(f"the recipe {recipe} does not quantize; name one that does", option="for")
    used = {scheme for schemes in needed_schemes(resolved).values() for scheme in schemes}
    return {component: [name for name in schemes if name in used] for component, schemes in ALL_SCHEMES.items()}


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise CalibrationError(
            f"{path} is not UTF-8 text; write one instruction per line", option="instructions"
        ) from None
    if not any(lines):
        raise CalibrationError(f"{path} has no instruction; write one per line", option="instructions")
    return [line for line in lines if line]
