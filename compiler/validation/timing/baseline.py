"""A timing beside an earlier one: which stages take longer, by more than the tolerance and by more than noise."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qie.compiler.validation.timing.record import WHOLE, Conditions, StageTime, Timing
from qie.engines.errors import RequestError, first_line
from qie.engines.files import read_regular
from qie.engines.records import from_plain

__all__ = ["SIGNIFICANCE", "StageVerdict", "check_baseline", "compare_timings", "read_timing"]

SIGNIFICANCE = 0.01
"""Largest p of the Mann-Whitney U test at which a difference is no noise."""

SHORT = 0.01
"""Share of the whole edit below which a stage is not judged."""

LONGEST = 1 << 26
"""Bytes of a timing."""

Verdict = Literal["slower", "faster", "equal", "noise", "short", "added", "removed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageVerdict:
    """A stage beside that of the baseline.

    Attributes:
        stage: its name.
        old, new: medians in seconds; None where the stage did not run.
        ratio: new to old; None where the old one is 0, or one is missing.
        p: of the one-sided Mann-Whitney U test, that the times come from one distribution; None where one is missing.
        verdict: ``equal`` within the tolerance, ``noise`` where the medians differ by more and p is not below
            ``SIGNIFICANCE``, ``short`` for a stage that takes less than ``SHORT`` of the edit in both, ``added`` for
            one that only the new timing has, ``removed`` for one that only the baseline has.
    """

    stage: str
    old: float | None
    new: float | None
    ratio: float | None
    p: float | None
    verdict: Verdict


def read_timing(path: Path) -> Timing:
    """The timing in a file of ``qie bench``.

    Raises:
        RequestError: the file cannot be read or is something else.
    """
    try:
        content = read_regular(path, most=LONGEST)
    except (OSError, ValueError) as problem:
        raise RequestError(
            f"the baseline {path} cannot be read ({getattr(problem, 'strerror', None) or problem}); check its name and "
            "permissions",
            option="baseline",
        ) from None
    try:
        return from_plain(Timing, json.loads(content))
    except (ValueError, RecursionError) as problem:
        raise RequestError(
            f"{path} is no timing of this qie ({first_line(problem)}); write one with `qie bench -o`",
            option="baseline",
        ) from None


def check_baseline(baseline: Timing, conditions: Conditions, repeats: int) -> None:
    """Check before the work that a timing under ``conditions`` can be compared with ``baseline``.

    Raises:
        RequestError: it is of another machine, model or edit, or there are too few measured edits for a verdict.
    """
    for (name, before), now in zip(baseline.conditions.facts().items(), conditions.facts().values(), strict=True):
        if before != now:
            raise RequestError(
                f"the {name} of the baseline is {before}, and that of this run is {now}; time the baseline again under "
                "the same conditions",
                option="baseline",
            )
    if 1 / math.comb(baseline.repeats + repeats, repeats) >= SIGNIFICANCE:
        raise RequestError(
            f"{baseline.repeats} edits of the baseline and {repeats} of this run are too few to tell a difference from "
            "noise; measure at least 5 edits of each",
            option="repeats",
        )


def compare_timings(baseline: Timing, timing: Timing, tolerance: float) -> tuple[StageVerdict, ...]:
    """Every stage of either timing, whose medians may differ by ``tolerance`` (0.05 is 5 %).

    The stages are in the order of an edit, those that only the baseline has before the whole.
    """
    whole = max(_whole(baseline).median, _whole(timing).median)
    removed = [
        StageVerdict(stage=old.stage, old=old.median, new=None, ratio=None, p=None, verdict="removed")
        for old in baseline.stages
        if timing.stage(old.stage) is None
    ]
    found = []
    for stage in timing.stages:
        before = baseline.stage(stage.stage)
        found += removed if stage.stage == WHOLE else []
        if before is None:
            found.append(
                StageVerdict(stage=stage.stage, old=None, new=stage.median, ratio=None, p=None, verdict="added")
            )
        else:
            found.append(_judged(before, stage, tolerance, short=SHORT * whole))
    return tuple(found)


def _judged(old: StageTime, new: StageTime, tolerance: float, *, short: float) -> StageVerdict:
    slower = new.median >= old.median
    p = _significance(new, old, slower=slower)
    verdict: Verdict
    if max(old.median, new.median) < short:
        verdict = "short"
    elif abs(new.median - old.median) <= tolerance * old.median:
        verdict = "equal"
    elif p >= SIGNIFICANCE:
        verdict = "noise"
    else:
        verdict = "slower" if slower else "faster"
    ratio = new.median / old.median if old.median else None
    return StageVerdict(stage=new.stage, old=old.median, new=new.median, ratio=ratio, p=p, verdict=verdict)


def _significance(new: StageTime, old: StageTime, *, slower: bool) -> float:
    """The p of the one-sided Mann-Whitney U test; 1 where all times are equal, which have no order."""
    from scipy.stats import mannwhitneyu

    if len({*new.seconds, *old.seconds}) == 1:
        return 1.0
    return float(mannwhitneyu(new.seconds, old.seconds, alternative="greater" if slower else "less").pvalue)


def _whole(timing: Timing) -> StageTime:
    return next(stage for stage in timing.stages if stage.stage == WHOLE)
