"""``qie validate``: whether the engines of a bundle are right, for people and for CI."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qie.compiler.cli.options import LoraOption
from qie.engines.cli.options import BundleArgument, DeviceOption, check_out
from qie.engines.errors import RequestError
from qie.engines.terminal import Bars, say

if TYPE_CHECKING:
    from qie.compiler.validation.report import Level

__all__ = ["validate"]

SUMMARY = "GITHUB_STEP_SUMMARY"
"""The variable in which GitHub Actions names the file of a step's summary."""


def validate(
    bundle: BundleArgument,
    golden: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Golden file of `qie golden`.", show_default="the one that comes with pocket"
        ),
    ] = None,
    level: Annotated[
        str, typer.Option(metavar="LEVEL", help="Last level: structure, components, trajectory or edits.")
    ] = "edits",
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What executes; onnxruntime runs the graphs of the engines on the CPU.",
            show_default="the engines where they run here, else onnxruntime",
        ),
    ] = None,
    require: Annotated[bool, typer.Option("--require", help="Fail where a check could not run.")] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Compare every operation with the golden file; needs onnxruntime.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Checkpoint of the bundle, to run its graphs.", show_default="pocket where it is that"
        ),
    ] = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one HTML page.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a Markdown summary.")] = None,
) -> None:
    """Check that the engines of a bundle are right.

    Runs what this machine can run: files and contracts everywhere, engines on their GPU, their graphs with onnxruntime
    elsewhere. Every check has a gate in the recipe, and is passed, failed or not run. Exits with 1 where one failed or,
    with --require, did not run. In GitHub Actions the summary of the step gets the Markdown.
    """
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.validation.reports.registry import REPORTS, write_report
        from qie.compiler.validation.run import Options
        from qie.compiler.validation.run import validate as run

    files = {"junit": junit, "json": json, "html": html, "markdown": markdown}
    wanted = {kind: path for kind, path in files.items() if path is not None}
    _check_files(wanted, bundle, golden)
    options = Options(
        golden=golden,
        backend=backend,
        level=cast("Level", level),
        model=model,
        loras=lora or (),
        device=device,
        required=require,
        bisect=bisect,
    )
    with Bars() as bars:
        report = run(bundle, options, progress=bars)
    say(REPORTS["text"](report))
    for kind, path in wanted.items():
        write_report(report, path, kind)
    summary = os.environ.get(SUMMARY)
    if summary:
        _add_to_summary(Path(summary), REPORTS["markdown"](report))
    if report.verdict == "failed":
        raise typer.Exit(1)


def _check_files(wanted: dict[str, Path], bundle: str, golden: Path | None) -> None:
    """Check before the work that every report can be written and nothing else is lost.

    Reports of earlier runs are deleted: a run that ends early must not leave the report of another one.

    Raises:
        RequestError: a path cannot be written, is that of two reports or of the golden file, or is in the bundle.
    """
    from qie.engines.bundle.bundle import locate

    folder, seen = locate(bundle).resolve(), {} if golden is None else {golden.resolve(): "the golden file"}
    for kind, path in wanted.items():
        check_out(path, kind)
        place = path.resolve()
        if place in seen or folder in place.parents:
            what = seen.get(place, "a file of the bundle")
            raise RequestError(f"{path} is also {what}; choose another file", option=kind)
        seen[place] = f"the {kind} report"
    for path in wanted.values():
        path.unlink(missing_ok=True)


def _add_to_summary(path: Path, text: str) -> None:
    """Add ``text`` to the summary of a step, to which other commands add; it decides about nothing."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as problem:
        say(f"note: the summary {path} cannot be written ({problem.strerror or problem})", err=True)
