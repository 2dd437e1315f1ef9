"""``qie bench``: how long the stages of an edit take, and whether that is longer than in a baseline."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qie.engines.cli.options import BundleArgument, DeviceOption, JsonOption, check_out, parse_size, print_json
from qie.engines.errors import RequestError
from qie.engines.files import replacing
from qie.engines.terminal import Bars, human_memory, human_seconds, say, table, wrap

if TYPE_CHECKING:
    from qie.compiler.validation.timing.baseline import StageVerdict
    from qie.compiler.validation.timing.record import Timing

__all__ = ["bench"]

PERCENT = re.compile(r"(\d{1,4}(?:\.\d{1,4})?) ?%")


def bench(
    bundle: BundleArgument,
    baseline: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Timing of an earlier run to compare with.")
    ] = None,
    tolerance: Annotated[
        str, typer.Option(metavar="N%", help="How much slower than the baseline a median may be.")
    ] = "5%",
    repeats: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="Edits that are measured.")] = 10,
    warm_up: Annotated[
        int, typer.Option("--warm-up", metavar="N", min=0, max=10_000, help="Edits before these, after the first.")
    ] = 2,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of the result in pixels.", show_default="the model's area"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the recipe's")] = None,
    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 turns guidance off.", show_default="the recipe's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the timing as JSON, a later baseline.")
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the stages of an edit.

    The first edit, which loads the engines, is timed apart. Exits with 1 where a stage is slower than the baseline by
    more than the tolerance and by more than noise.
    """
    allowed, requested_size = _tolerance(tolerance), parse_size(size)
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.validation.timing.baseline import check_baseline, compare_timings, read_timing
        from qie.compiler.validation.timing.edits import time_bundle, workload
    from qie.engines.bundle.bundle import open_bundle
    from qie.engines.records import to_plain

    earlier = None if baseline is None else read_timing(baseline)
    _check_out(out, baseline)
    work = workload(open_bundle(bundle), size=requested_size, steps=steps, guidance=cfg, device=device)
    if earlier is not None:
        check_baseline(earlier, work.conditions, repeats)
    with Bars(enabled=not as_json) as bars:
        timing = time_bundle(
            work, warm_up=warm_up, repeats=repeats, progress=lambda done, total: bars("edits", done, total)
        )
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(to_plain(timing), indent=2) + "\n", encoding="utf-8")
    verdicts = () if earlier is None else compare_timings(earlier, timing, allowed)
    slower = [verdict.stage for verdict in verdicts if verdict.verdict == "slower"]
    if as_json:
        print_json({"timing": to_plain(timing), "baseline": to_plain(verdicts), "slower": slower})
    else:
        say(_describe(timing))
        if earlier is not None:
            say(f"\n{_compared(earlier, timing, verdicts, tolerance)}")
    if slower:
        raise typer.Exit(1)


def _tolerance(text: str) -> float:
    match = PERCENT.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"the tolerance is {text!r}, expected a percentage; give one such as 5%", option="tolerance")
    return float(match[1]) / 100


def _check_out(out: Path | None, baseline: Path | None) -> None:
    """Check before the work that the timing can be written, and not over the baseline."""
    check_out(out)
    if out is not None and baseline is not None and out.exists() and out.samefile(baseline):
        raise RequestError(f"{out} is the baseline and would be lost; choose another file", option="out")


def _describe(timing: "Timing") -> str:
    conditions, machine = timing.conditions, timing.machine
    guidance = f"guidance {conditions.guidance:g}" if conditions.guidance > 1 else "no guidance"
    gpu = "" if timing.gpu_peak_bytes is None else f", {human_memory(timing.gpu_peak_bytes)} of the GPU in use"
    facts = [
        ["bundle", f"{timing.bundle} ({conditions.model}, recipe {Path(timing.recipe).name})"],
        ["machine", f"{conditions.gpu or conditions.cpu}, {conditions.cores} cores, {machine.system}"],
        ["edit", f"{conditions.size}, {conditions.steps} steps, {guidance}"],
        ["edits", f"1 first, {timing.warm_up} to warm up, {timing.repeats} measured"],
        ["peak memory", f"{human_memory(timing.host_peak_bytes)}{gpu}"],
    ]
    rows = [[s.stage, *map(human_seconds, (s.first, s.median, s.least, s.p90, s.spread))] for s in timing.stages]
    header = ["stage", "first", "median", "min", "p90", "IQR"]
    return f"{table(facts)}\n\n{table(rows, header=header, right=range(1, 6))}"


def _compared(baseline: "Timing", timing: "Timing", verdicts: "tuple[StageVerdict, ...]", tolerance: str) -> str:
    told = {
        "slower": "slower",
        "faster": "faster",
        "equal": f"within {tolerance}",
        "noise": "within noise",
        "short": "too short to judge",
        "added": "not in the baseline",
        "removed": "only in the baseline",
    }
    rows = [
        [v.stage, _seconds(v.old), _seconds(v.new), _ratio(v.new, v.old), _p(v.p), told[v.verdict]] for v in verdicts
    ]
    peaks = [("peak memory", baseline.host_peak_bytes, timing.host_peak_bytes)]
    if baseline.gpu_peak_bytes and timing.gpu_peak_bytes:
        peaks.append(("peak memory of the GPU", baseline.gpu_peak_bytes, timing.gpu_peak_bytes))
    rows += [[what, human_memory(a), human_memory(b), _ratio(b, a), "", ""] for what, a, b in peaks]
    text = table(rows, header=["stage", "baseline", "now", "ratio", "p", "verdict"], right=[1, 2, 3, 4])
    slower = [v.stage for v in verdicts if v.verdict == "slower"]
    last = f"slower than the baseline: {', '.join(slower)}" if slower else "no stage is slower than the baseline"
    return f"{text}\n\n{wrap(last)}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else human_seconds(value)


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _ratio(new: float | None, old: float | None) -> str:
    return f"{new / old:.3f}" if new is not None and old else "-"
