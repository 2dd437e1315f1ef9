"""Structure: files, contracts, targets and precision, without running an engine."""

from collections.abc import Iterator
from dataclasses import fields

from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.checks.check import CheckSpec, Finding, NotApplicable, Outcome, counted
from qie.compiler.validation.golden.match import unlike
from qie.compiler.validation.modulation import table_differences
from qie.compiler.validation.onnx_file import graph_interface, interface_of, wrong_precision
from qie.compiler.validation.scales import wrong_scales
from qie.compiler.validation.subject import Subject
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, check_file
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, GraphRecord, Manifest, titles
from qie.engines.bundle.structure import read_structure
from qie.engines.errors import BundleError

__all__ = ["SPECS"]


def files(subject: Subject) -> Iterator[Outcome]:
    """Every file of the bundle against the digest in its manifest."""
    bundle, damaged = subject.bundle, []
    bundle.folder.verified.clear()
    records = bundle.manifest.files()
    for number, record in enumerate(records):
        subject.progress(number, len(records))
        try:
            check_file(bundle, record)
        except BundleError as problem:
            damaged.append(str(problem))
    yield counted(damaged, f"{len(records)} files, {bundle.bytes:,} bytes, have the digests of the manifest")


def golden(subject: Subject) -> Iterator[Outcome]:
    """The golden file is of the bundle's model and LoRAs."""
    if subject.golden is None:
        yield Finding(value=None, detail=subject.no_golden)
        return
    record = subject.golden.record
    fine = f"{len(record.cases)} cases of {record.model}, recorded in {record.dtype}"
    yield counted(unlike(subject.golden, subject.bundle), fine)


def contract(subject: Subject) -> Iterator[Outcome]:
    """Inputs and outputs of every ONNX graph are those that the manifest gives."""
    problems, graphs = [], _graphs(subject.bundle)
    for record in graphs:
        found = subject.bundle.folder.read(lambda folder, path=record.path: graph_interface(folder / path))  # type: ignore[misc]
        expected = interface_of(record)
        problems += [
            f"{record.component}: {name} is {found.get(name, 'absent')}, expected {expected.get(name, 'absent')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
    if graphs:
        yield counted(problems, f"inputs and outputs of {len(graphs)} graphs are those of the manifest")
    else:
        yield NO_GRAPHS


NO_GRAPHS = NotApplicable(reason="the bundle has compiled engines and no graphs")


def _graphs(bundle: Bundle) -> list[EngineRecord | GraphRecord]:
    """The engines that are ONNX graphs, and the graphs whose engines are not built yet."""
    records: list[EngineRecord | GraphRecord] = [e for e in bundle.manifest.engines if not _is_compiled(e)]
    records += bundle.manifest.graphs
    return [record for record in records if BACKENDS[record.backend].source == "graph"]


def _is_compiled(engine: EngineRecord) -> bool:
    backend = BACKENDS.get(engine.backend)
    return backend is not None and backend.compiles


def target(subject: Subject) -> Iterator[Outcome]:
    """Backend, compute capability and precision of every engine, and settings of the bundle, are the recipe's."""
    problems = [text for engine in subject.bundle.manifest.engines for text in _other_target(engine, subject.recipe)]
    problems += _incomplete(subject.bundle.manifest)
    problems += _other_settings(subject.bundle.manifest, subject.recipe)
    missing = titles(subject.bundle.manifest.graphs)
    found = ", ".join(sorted({f"{e.backend}/{e.compute_capability}" for e in subject.bundle.manifest.engines}))
    later = f"; {', '.join(missing)} wait for `qie build --finish`" if missing else ""
    yield counted(problems, f"{found}, as the recipe {subject.bundle.manifest.recipe.name} says{later}")


def _other_target(engine: EngineRecord, recipe: Recipe) -> Iterator[str]:
    capability, section = recipe.compute_capability or "cpu", recipe.components[engine.component]
    if engine.compute_capability != capability:
        yield f"{engine.component} is built for {engine.compute_capability}, the recipe is for {capability}"
    if engine.backend not in recipe.backends_of(engine.component):
        yield f"{engine.component} is built for {engine.backend}, which the recipe does not list for it"
    if engine.precision != section.precision:
        yield f"{engine.component} computes in {engine.precision}, the recipe says {section.precision}"
    scheme = "none" if engine.quantization is None else engine.quantization.scheme
    if scheme != section.scheme:
        yield f"{engine.component} has the scheme {scheme}, the recipe says {section.scheme}"


def _incomplete(manifest: Manifest) -> Iterator[str]:
    """Components without an engine or a graph that waits for one, and engines that are there twice."""
    waiting = {graph.component for graph in manifest.graphs}
    for component in COMPONENTS:
        parts = [(e.backend, e.compute_capability, e.part) for e in manifest.engines if e.component == component]
        if not parts and component not in waiting:
            yield f"{component} has no engine"
        if len(set(parts)) < len(parts):
            yield f"{component} has two engines of one target"
        for target in sorted({found[:2] for found in parts}):
            numbers = sorted(part for *place, part in parts if tuple(place) == target)
            if numbers != list(range(len(numbers))):
                yield f"{component} lacks a part before part {numbers[-1] + 1}"


def _other_settings(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """What a bundle has of its recipe as values of its own: noise, residency, limits, and the recipe's digest."""
    if manifest.recipe.sha256 != recipe.digest():
        yield f"the recipe {manifest.recipe.name} has another digest than the manifest says"
    for name in ("noise", "residency", "specialization"):
        found, expected = getattr(manifest.defaults, name), getattr(recipe, name)
        if found != expected:
            yield f"the default of {name} is {found}, the recipe says {expected}"
    limits = recipe.shape_limits(manifest.model.areas.vae_area)
    for field in fields(limits):
        found, expected = getattr(manifest.limits, field.name), getattr(limits, field.name)
        if found != expected and not (field.name == "references_max" and found < expected):  # a model may take fewer
            yield f"the limit {field.name} is {found}, the recipe says {expected}"


def precision(subject: Subject) -> Iterator[Outcome]:
    """The dtype of every weight of every ONNX graph, and which linears are quantized, are those of the recipe."""
    problems, weights = [], 0
    for record in _graphs(subject.bundle):
        count, wrong = wrong_precision(subject.bundle, record, subject.recipe)
        weights += count
        problems += wrong
    if weights:
        yield counted(problems, f"{weights} weights have the dtypes of the recipe")
    else:
        yield NO_GRAPHS


def scales(subject: Subject) -> Iterator[Outcome]:
    """The scales of inputs and of smoothing in every quantized ONNX graph are those of the calibration."""
    problems, inputs = [], 0
    for record in _graphs(subject.bundle):
        count, wrong = wrong_scales(subject.bundle, record, subject.recipe)
        inputs += count
        problems += wrong
    if inputs or problems:
        yield counted(problems, f"{inputs} inputs of linears are scaled as the calibration says")
    else:
        yield NotApplicable(reason="no ONNX graph of the bundle quantizes inputs")


def quantized_kernels(subject: Subject) -> Iterator[Outcome]:
    """The part of the quantized linears that kernels of a compiled engine compute from quantized values."""
    engines = [engine for engine in _compiled(subject.bundle) if _computes_quantized(engine, subject.recipe)]
    for engine in engines:
        record = engine.quantization
        if engine.structure is None or record is None:
            yield _undescribed(engine, subject.bundle)
            continue
        if not record.quantized and len(engines) > 1:  # a part of blocks that are excluded
            continue
        detail = f"{record.fused} of {record.quantized} quantized linears in 8-bit kernels"
        yield _fraction(engine, subject.bundle, record.fused, record.quantized, detail)
    if not engines:
        yield NotApplicable(reason="no compiled engine of the bundle computes from quantized values")


def _computes_quantized(engine: EngineRecord, recipe: Recipe) -> bool:
    scheme = recipe.components[engine.component].scheme
    return scheme != "none" and SCHEMES[scheme].inputs is not None


def fused_attention(subject: Subject) -> Iterator[Outcome]:
    """The part of the attention layers of a compiled engine that kernels compute without a score tensor."""
    found = 0
    for engine in _compiled(subject.bundle):
        if engine.structure is None:
            found += 1
            yield _undescribed(engine, subject.bundle)
            continue
        structure = read_structure(subject.bundle, engine)
        if structure.attention:
            found += 1
            types = f" in {', '.join(structure.fused_types)}" if structure.fused_types else ""
            detail = f"{structure.fused} of {structure.attention} attention layers fused{types}"
            yield _fraction(engine, subject.bundle, structure.fused, structure.attention, detail)
    if not found:
        yield NotApplicable(reason="the bundle has no compiled engine with attention")


def _compiled(bundle: Bundle) -> list[EngineRecord]:
    """The engines that were compiled from graphs, which have a description of their layers and kernels."""
    compiled = [engine for engine in bundle.manifest.engines if _is_compiled(engine)]
    return [engine for engine in compiled if BACKENDS[engine.backend].source == "graph"]


def _case(engine: EngineRecord, bundle: Bundle) -> str:
    """The engine for people, such as ``transformer 1/2, tensorrt-rtx``."""
    engines = bundle.manifest.engines
    return f"{titles(engines)[engines.index(engine)]}, {engine.backend}"


def _undescribed(engine: EngineRecord, bundle: Bundle) -> Finding:
    detail = "the engine has no description of its layers; build the bundle again with `qie build`"
    return Finding(value=None, case=_case(engine, bundle), detail=detail)


def _fraction(engine: EngineRecord, bundle: Bundle, count: int | None, total: int, detail: str) -> Finding:
    """``count`` of ``total``; not run where the description does not have the count."""
    case = _case(engine, bundle)
    if count is None:
        return Finding(
            value=None,
            case=case,
            detail=f"{engine.backend} does not describe its kernels; look at a profile on the GPU",
        )
    return Finding(value=count / total, case=case, detail=detail)


def graphs(subject: Subject) -> Iterator[Outcome]:
    """Where graphs are run in place of engines: the engines were built from these graphs."""
    if subject.other_graphs is not None:
        count = len(subject.bundle.manifest.engines)
        yield counted(
            subject.other_graphs, f"{count} engines were built from the graphs that are run here in their place"
        )
    else:
        yield NotApplicable(reason="no graphs run in place of the engines")


def schedules(subject: Subject) -> Iterator[Outcome]:
    """The bundle has the modulation tables of its default schedule, and no table that its recipe does not lead to."""
    missing, unexplained = table_differences(subject.bundle, subject.recipe)
    problems = [f"the table of {steps} steps at {size} is missing" for steps, size in missing]
    problems += [f"no schedule of the recipe leads to {path}" for path in unexplained]
    yield counted(problems, f"{len(subject.bundle.manifest.schedules)} tables of the recipe's schedules")


SPECS = (
    CheckSpec(level="structure", name="files", metric="damaged files", unit="", gate=None, sense="at most", run=files),
    CheckSpec(
        level="structure", name="golden file", metric="differences", unit="", gate=None, sense="at most", run=golden
    ),
    CheckSpec(
        level="structure", name="contract", metric="differences", unit="", gate=None, sense="at most", run=contract
    ),
    CheckSpec(level="structure", name="target", metric="differences", unit="", gate=None, sense="at most", run=target),
    CheckSpec(
        level="structure", name="precision", metric="differences", unit="", gate=None, sense="at most", run=precision
    ),
    CheckSpec(level="structure", name="scales", metric="differences", unit="", gate=None, sense="at most", run=scales),
    CheckSpec(
        level="structure", name="schedules", metric="differences", unit="", gate=None, sense="at most", run=schedules
    ),
    CheckSpec(level="structure", name="graphs", metric="differences", unit="", gate=None, sense="at most", run=graphs),
    CheckSpec(
        level="structure",
        name="quantized kernels",
        metric="fraction of the quantized linears",
        unit="",
        gate="gates.structure.quantized_kernels",
        sense="at least",
        run=quantized_kernels,
    ),
    CheckSpec(
        level="structure",
        name="fused attention",
        metric="fraction of the attention layers",
        unit="",
        gate="gates.structure.fused_attention",
        sense="at least",
        run=fused_attention,
    ),
)
