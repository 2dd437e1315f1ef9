"""Edits: equal requests give equal bytes, whatever ran before, runs beside them, or on how many threads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

from PIL import Image

from qie.compiler.validation.checks.check import CheckSpec, Finding, NotApplicable, Outcome, counted, not_taken
from qie.compiler.validation.edits import images_of
from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed, Subject, request_of
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import RequestError

__all__ = ["SPECS", "THREADS"]

STEPS = 2
"""Denoising steps: what differs in a step differs in the image, and two pass latents on."""

SEEDS = 3
"""Results of one request: as a batch where the engines take as many, which leaves a smaller one where they take two."""

THREADS = (1, 2, 3)
"""Numbers of threads that are compared; with three, work does not divide evenly."""

Images = Sequence[Image.Image]
Compare = Callable[[Executed, GoldenCase], Finding | NotApplicable]


def _first_case(
    subject: Subject, *, compare: Callable[[Executed, GoldenCase], Finding | NotApplicable]
) -> Iterator[Outcome]:
    """``compare`` of the first case of the golden file, with the engines of the bundle themselves."""
    if subject.golden is None or subject.executed is None:
        yield Finding(value=None, detail=subject.obstacle or "")
        return
    if subject.executed.rebuilt:
        detail = "graphs run here in place of the engines, whose bytes are meant; run it on the machine of the engines"
        yield Finding(value=None, detail=detail)
        return
    case = subject.golden.cases[0]
    try:
        yield compare(subject.executed, case)
    except RequestError as problem:
        yield Finding(value=None, detail=not_taken(problem), case=case.record.name, on=subject.executed.on)


def repeats(executed: Executed, case: GoldenCase) -> Finding:
    """The same seed twice, and once more after an edit of another size."""
    request = _request(case, [case.record.seed])
    first, second = images_of(executed, [request, request])
    differing = ["the same request again gives other bytes"] if not _equal([first], [second]) else []
    other = _other_size(executed, case)
    if other is None:
        tried = "the same request twice; the bundle takes one size alone"
    else:
        _, third = images_of(executed, [_request(case, [case.record.seed], size=other), request])
        tried = f"the same request twice, and after an edit of {other[0]}x{other[1]} pixels"
        if not _equal([first], [third]):
            differing.append(f"the same request gives other bytes after an edit of {other[0]}x{other[1]} pixels")
    return counted(differing, f"equal bytes: {tried}", on=executed.on)


def batches(executed: Executed, case: GoldenCase) -> Finding | NotApplicable:
    """Several seeds in one request and one by one."""
    if executed.bundle.manifest.limits.batch_max == 1:
        return NotApplicable(reason="the engines take one image a run")
    seeds = [case.record.seed + number for number in range(SEEDS)]
    alone = images_of(executed, [_request(case, [seed]) for seed in seeds])
    together = images_of(executed, [_request(case, seeds)])
    pairs = zip(seeds, alone, together, strict=True)
    differing = [
        f"seed {seed} gives other bytes among {SEEDS} than alone"
        for seed, one, other in pairs
        if not _equal([one], [other])
    ]
    most = min(SEEDS, executed.bundle.manifest.limits.batch_max)
    tried = f"{SEEDS} seeds in one request, in batches of {most}, and one by one"
    return counted(differing, f"equal bytes: {tried}", on=executed.on)


def threads(executed: Executed, case: GoldenCase) -> Finding | NotApplicable:
    """The same request on one, two and three threads of the CPU."""
    engines = executed.stages.engines
    if any(engine.compute_capability != "cpu" for engine, *_ in engines.values()):
        return NotApplicable(reason="the engines run on a GPU, where threads are not chosen")
    results = []
    for count in THREADS:
        with closing(Stages(executed.bundle, engines, threads=count)) as stages:
            results.append(images_of(executed, [_request(case, [case.record.seed])], stages=stages))
    differing = [
        f"{count} threads give other bytes than {THREADS[0]}"
        for count, images in zip(THREADS, results, strict=True)
        if not _equal(images, results[0])
    ]
    tried = f"the same request on {', '.join(map(str, THREADS))} threads"
    return counted(differing, f"equal bytes: {tried}", on=executed.on)


def _request(case: GoldenCase, seeds: Sequence[int], *, size: tuple[int, int] | None = None) -> Request:
    """The edit of ``case`` from the noise of ``seeds``."""
    changed = {} if size is None else {"size": size}
    return request_of(case, seeds=seeds, noise=None, steps=STEPS, **changed)


def _other_size(executed: Executed, case: GoldenCase) -> tuple[int, int] | None:
    """A size that the bundle takes and the case does not have."""
    buckets = [(bucket.width, bucket.height) for bucket in executed.bundle.manifest.limits.buckets]
    return next((size for size in buckets if size != (case.record.width, case.record.height)), None)


def _equal(images: Images, others: Images) -> bool:
    return [(image.size, image.tobytes()) for image in images] == [(image.size, image.tobytes()) for image in others]


SPECS = tuple(
    CheckSpec(
        level="edits",
        name=name,
        metric="results that differ",
        unit="",
        gate=None,
        sense="at most",
        run=partial(_first_case, compare=compare),
    )
    for name, compare in (("repeats", repeats), ("batches", batches), ("threads", threads))
)
