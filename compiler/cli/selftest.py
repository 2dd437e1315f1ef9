"""``qie selftest``: what a GPU does with small engines, to read and to paste into a report."""

from typing import TYPE_CHECKING, Annotated

import typer

from qie.engines.cli.options import DeviceOption, JsonOption, print_json
from qie.engines.terminal import Bars, human_seconds, say, table, wrap

if TYPE_CHECKING:
    from qie.compiler.selftest.report import Report

__all__ = ["selftest"]


def selftest(
    device: DeviceOption = None,
    backend: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Backend to test, tensorrt-rtx or tensorrt; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Test the GPU of this machine with small engines.

    Builds the pocket model for the GPU with every backend that serves it, loads and runs its engines, and compares
    them with the CPU: contracts, memory, parity, equal bytes, CUDA graphs, kernels for new shapes. Exits with 1 where
    a check fails or no backend could be tested.
    """
    import tempfile
    from pathlib import Path

    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.selftest.run import TESTED, run
    from qie.engines.errors import RequestError
    from qie.engines.records import to_plain

    unknown = [name for name in backend or () if name not in TESTED]
    if unknown:
        raise RequestError(f"{unknown[0]!r} cannot be tested; choose {' or '.join(TESTED)}", option="backend")
    with tempfile.TemporaryDirectory(prefix="qie-selftest-") as folder, Bars(enabled=not as_json) as bars:
        report = run(Path(folder), device=device, backends=backend or TESTED, progress=bars)
    if as_json:
        print_json(to_plain(report))
    else:
        _print(report)
    if report.count("failed") or not report.count("passed"):
        raise typer.Exit(1)


def _print(report: "Report") -> None:
    machine = report.machine
    facts = [
        ["qie", report.qie],
        ["GPU", report.gpu],
        ["machine", f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB, {machine.system}"],
        ["driver", " ".join(filter(None, [machine.driver, f"(CUDA {machine.cuda})" if machine.cuda else None])) or "-"],
        ["packages", ", ".join(f"{name} {version}" for name, version in report.packages)],
    ]
    rows = [[c.backend, c.name, c.result, human_seconds(c.seconds)] for c in report.checks]
    found = [check.found for check in report.checks]
    say(table(facts))
    say()
    say(table(rows, header=["backend", "check", "result", "time"], notes=found))
    say()
    for warning in report.warnings:
        say(wrap(f"TensorRT: {warning}"))
    say(f"{report.count('passed')} passed, {report.count('failed')} failed, {report.count('skipped')} skipped")
    if report.count("skipped") == len(report.checks):
        say("nothing was tested: no backend serves this GPU here", err=True)
