"""A validation: choose what runs here, run every check up to a level, and gather the report."""

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import qie
from qie.compiler.packing.build import build
from qie.compiler.planning.resolve import LoraSource
from qie.compiler.recipe.gates import Gates, flat
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.bisect import bisectable, bisection
from qie.compiler.validation.checks.check import NONE_ALLOWED, CheckSpec, Finding, NotApplicable, judged, not_computed
from qie.compiler.validation.checks.registry import CHECKS, check_gates
from qie.compiler.validation.golden.file import Golden, open_golden
from qie.compiler.validation.golden.match import own_golden
from qie.compiler.validation.provenance import damaged_provenance, executed_name, provenance
from qie.compiler.validation.rebuild import find_model, other_contents, other_graphs, plan_rebuild
from qie.compiler.validation.report import (
    LEVELS,
    Bisection,
    CaseImages,
    Check,
    Gate,
    Inapplicable,
    Level,
    Measurement,
    Report,
)
from qie.compiler.validation.subject import Executed, Subject
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, locate, open_bundle
from qie.engines.bundle.manifest import MANIFEST
from qie.engines.errors import (
    BackendMissingError,
    BundleError,
    CheckpointError,
    EngineMismatchError,
    QieError,
    RecipeError,
    RequestError,
)
from qie.engines.progress import Progress, no_progress
from qie.engines.sessions.choose import choose_engines

__all__ = ["Options", "validate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a person may choose.

    Attributes:
        golden: the golden file; None for the one that comes with the model.
        backend: that executes; None for the engines where this machine runs them, else onnxruntime.
        level: the last level to check.
        model: the bundle's checkpoint, for building its graphs again; None where it is known (pocket).
        loras: those of the bundle, for the same purpose.
        device: CUDA index of the GPU; None for the first that fits.
        required: whether a check that did not run is a failure.
        bisect: compare every operation of every graph with the golden file.
    """

    golden: Path | None = None
    backend: str | None = None
    level: Level = "edits"
    model: str | None = None
    loras: Sequence[LoraSource] = ()
    device: int | None = None
    required: bool = False
    bisect: bool = False


def validate(name: str | Path, options: Options, *, progress: Progress = no_progress) -> Report:
    """Check the bundle ``name`` up to ``options.level``.

    A bundle whose files are damaged, and a check that raises, are failures in the report.

    Args:
        name: name or folder of a bundle.
        options: what to check, against what, on what.
        progress: called with (check, units done, units in all).

    Raises:
        BundleError: there is no such bundle.
        GoldenError: the golden file is missing or damaged.
        RequestError: the bundle cannot be run by ``options.backend``.
        CheckpointError: ``options.model`` or its LoRAs are not the bundle's.
    """
    check_gates(CHECKS)
    if options.level not in LEVELS:
        raise RequestError(f"there is no level {options.level!r}; choose one of {', '.join(LEVELS)}", option="level")
    chosen = (options.bisect, options.backend, options.device is not None, options.model, options.loras)
    if options.level == "structure" and any(chosen):
        raise RequestError(
            "level structure runs nothing, so that nothing can be chosen to run or be bisected; choose a later level",
            option="level",
        )
    start, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    if options.backend is not None and options.backend not in BACKENDS:
        raise RequestError(
            f"there is no backend {options.backend!r}; choose one of {', '.join(BACKENDS)}", option="backend"
        )
    path = locate(name)
    try:
        bundle = open_bundle(path)
        recipe = _recipe(bundle)
    except BundleError as problem:
        return _damaged(path, problem, options, created, start)
    golden, no_golden = _golden(bundle, options)
    with ExitStack() as stack:
        subject = Subject(
            bundle=bundle,
            recipe=recipe,
            golden=golden,
            no_golden=no_golden,
            wants_graphs=options.backend == "onnxruntime",
        )
        if options.level != "structure":
            _choose(subject, options, stack, progress)
            _check_bisect(subject, options)
        checks: list[Check] = []
        inapplicable: list[Inapplicable] = []
        measurements: list[Measurement] = []
        images: list[CaseImages] = []
        for spec in _up_to(options.level):
            for outcome in _run(spec, subject, progress):
                match outcome:
                    case Check():
                        checks.append(outcome)
                    case Inapplicable():
                        inapplicable.append(outcome)
                    case Measurement():
                        measurements.append(outcome)
                    case CaseImages():
                        images.append(outcome)
        bisections = list(_bisections(subject, options, checks))
        return Report(
            qie=qie.__version__,
            created=created,
            level=options.level,
            required=options.required,
            provenance=provenance(subject),
            checks=tuple(checks),
            inapplicable=tuple(inapplicable),
            measurements=tuple(measurements),
            images=tuple(images),
            bisections=tuple(bisections),
            seconds=round(time.perf_counter() - start, 3),
        )


def _recipe(bundle: Bundle) -> Recipe:
    record = bundle.manifest.recipe
    try:
        return parse_recipe(record.toml, bundle.path / MANIFEST)
    except RecipeError as problem:
        found, _, _ = str(problem).partition(";")
        raise BundleError(
            f"the recipe in {bundle.path} cannot be read ({found}); build the bundle again with `qie build`"
        ) from problem


def _up_to(level: Level) -> Iterator[CheckSpec]:
    wanted = LEVELS[: LEVELS.index(level) + 1]
    return (spec for spec in CHECKS if spec.level in wanted)


def _golden(bundle: Bundle, options: Options) -> tuple[Golden | None, str]:
    """The golden file, or why there is none."""
    if options.golden is not None:
        return open_golden(options.golden), ""
    own = own_golden(bundle)
    if own is not None:
        return open_golden(own), ""
    return None, "no golden file was named; record one with `qie golden`, and name it"


def _choose(subject: Subject, options: Options, stack: ExitStack, progress: Progress) -> None:
    """Give ``subject`` what executes for its bundle on this machine, or the reason why nothing does."""
    bundle = _of_backend(subject.bundle, options.backend)
    if bundle is None and options.backend != "onnxruntime":
        raise RequestError(
            f"{subject.bundle.path} has no engine of {options.backend}; choose a backend that `qie inspect` lists, or "
            "onnxruntime, which runs the graphs that the engines were built from",
            option="backend",
        )
    if bundle is not None:
        try:
            engines = choose_engines(bundle, options.device)
        except (EngineMismatchError, BackendMissingError) as problem:
            if options.device is not None:
                raise
            subject.not_executed = str(problem)
            if options.backend not in (None, "onnxruntime"):
                return
        except QieError as problem:  # such as a component without an engine, which the level structure has found
            subject.not_executed = str(problem)
            return
        else:
            _refuse_model(options)
            executed = Executed.of(
                subject.bundle, engines, on=executed_name(engines), rebuilt=False, device=options.device
            )
            stack.callback(executed.close)
            subject.executed = executed
            return
    _rebuild(subject, options, stack, progress)


def _refuse_model(options: Options) -> None:
    """Refuse what is read only where graphs are built again."""
    for option, value in (("model", options.model), ("loras", options.loras)):
        if value:
            raise RequestError(
                f"the engines of the bundle run here, and nothing is built from a checkpoint; leave out the {option}",
                option=option,
            )


def _check_bisect(subject: Subject, options: Options) -> None:
    """Refuse to bisect engines; graphs that cannot run are not run like everything else."""
    if not options.bisect or subject.executed is None or subject.golden is None:
        return
    if not bisectable(subject.executed, subject.golden):
        raise RequestError(
            f"{subject.executed.on} has no operations to compare with the golden file; choose the backend onnxruntime, "
            "or record the golden file again with `qie golden`",
            option="backend",
        )


def _of_backend(bundle: Bundle, backend: str | None) -> Bundle | None:
    """``bundle`` with the engines of ``backend`` alone, and all of what that cannot run; None where it has none."""
    if backend is None:
        return bundle
    runs = BACKENDS[backend].components
    engines = tuple(e for e in bundle.manifest.engines if e.backend == backend or e.component not in runs)
    if not any(engine.backend == backend for engine in engines):
        return None
    return replace(bundle, manifest=replace(bundle.manifest, engines=engines))


def _rebuild(subject: Subject, options: Options, stack: ExitStack, progress: Progress) -> None:
    """Build the graphs of the bundle again in float32, where its checkpoint is known."""
    model = options.model or find_model(subject.bundle)
    if model is None:
        found, _, _ = (subject.not_executed or "its graphs are not in the bundle").partition(";")
        subject.not_executed = f"{found}; name the checkpoint of the bundle, whose graphs then run with onnxruntime"
        return
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qie-validate-")))
    try:
        planned = plan_rebuild(
            subject.bundle, subject.recipe, model, folder / "graphs", loras=options.loras, progress=progress
        )
        others = other_graphs(subject.bundle, planned.own, folder / "own", progress=progress)
        rebuilt = build(planned.cpu, progress=progress)
        subject.other_graphs = (*others, *other_contents(subject.bundle, rebuilt))
    except CheckpointError as problem:
        if options.model is not None or options.loras:
            raise
        subject.not_executed = str(problem)
        return
    except QieError as problem:  # it does not fit into this machine, or was built by a recipe of another qie
        subject.not_executed = f"the graphs cannot be built here: {problem}"
        return
    engines = choose_engines(rebuilt)
    executed = Executed.of(
        rebuilt, engines, on=f"{executed_name(engines)}, graphs in float32", rebuilt=True, device=None
    )
    stack.callback(executed.close)
    subject.executed, subject.not_own, subject.not_executed = executed, subject.not_executed, ""


def _run(
    spec: CheckSpec, subject: Subject, progress: Progress
) -> Iterator[Check | Inapplicable | Measurement | CaseImages]:
    """The outcomes of one check; what it raises is a failure, as is silence, and what it found before stays."""
    gate = _gate(spec, subject.recipe.gates)
    subject.progress = partial(progress, spec.name)
    start, silent = time.perf_counter(), True
    try:
        for outcome in spec.run(subject):
            match outcome:
                case Finding():
                    now, silent = time.perf_counter(), False
                    yield judged(spec, outcome, gate, round(now - start, 3))
                    start = now
                case NotApplicable():
                    silent = False
                    yield Inapplicable(level=spec.level, name=spec.name, reason=outcome.reason)
                case _:
                    yield outcome
        assert not silent, "it found nothing to judge"
    except Exception as problem:  # of whatever kind: the report says so, and the other checks run
        finding = Finding(value=math.nan, detail=not_computed(problem), on=_on(subject))
        yield judged(spec, finding, gate, round(time.perf_counter() - start, 3))
    progress(spec.name, 1, 1)


def _gate(spec: CheckSpec, gates: Gates) -> Gate:
    return NONE_ALLOWED if spec.gate is None else Gate(key=spec.gate, sense=spec.sense, bound=flat(gates)[spec.gate])


def _on(subject: Subject) -> str:
    return "" if subject.executed is None else subject.executed.on


def _bisections(subject: Subject, options: Options, checks: Sequence[Check]) -> Iterator[Bisection]:
    """The operations of every component that was asked for, or whose blocks left the gate."""
    if subject.executed is None or subject.golden is None:
        return
    failed = {check.case for check in checks if check.name == "blocks" and check.result == "failed"}
    for component in bisectable(subject.executed, subject.golden):
        if options.bisect or component in failed:
            with suppress(Exception):  # the check of the blocks has failed with it
                yield bisection(subject, component)


def _damaged(path: Path, problem: BundleError, options: Options, created: str, start: float) -> Report:
    """The report of a bundle that does not open: its files are damaged, and nothing else can be checked."""
    seconds = round(time.perf_counter() - start, 3)
    checks = []
    for spec in _up_to(options.level):
        gate = (
            NONE_ALLOWED if spec.gate is None else Gate(key=spec.gate, sense=spec.sense, bound=flat(Gates())[spec.gate])
        )
        found = Finding(value=None, detail="the bundle does not open; build it again with `qie build`")
        if spec.name == "files":
            found = Finding(value=1, detail=str(problem))
        checks.append(judged(spec, found, gate, 0.0))
    return Report(
        qie=qie.__version__,
        created=created,
        level=options.level,
        required=options.required,
        provenance=damaged_provenance(path),
        checks=tuple(checks),
        inapplicable=(),
        measurements=(),
        images=(),
        bisections=(),
        seconds=seconds,
    )
