"""The differences between two bundles, for the review of an engine upgrade."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qie.compiler.validation.diff.changes import Change, changes, flat
from qie.compiler.validation.diff.graph import GraphDiff, GraphFile, WeightChange, diff_graphs, diff_modulation
from qie.compiler.validation.diff.structure import StructureDiff, diff_structures, read_description
from qie.compiler.validation.diff.velocity import StepDistance
from qie.engines.bundle.bundle import Bundle, check_file
from qie.engines.bundle.manifest import COMPONENTS, Component, EngineRecord, GraphRecord, ModelRecord
from qie.engines.errors import BundleError
from qie.engines.progress import StageProgress, no_progress
from qie.engines.records import to_plain

__all__ = ["BundleDiff", "EngineDiff", "VelocityDiff", "diff_bundles"]

Piece = EngineRecord | GraphRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineDiff:
    """What differs between the engines of a component, or between its graphs that have no engine yet.

    Attributes:
        component: the component.
        part: number of several consecutive engines of one component.
        old, new: what they are built for, such as ``tensorrt-rtx/8.9``; None where there is no such engine.
        changes: of the record: versions, precision, key, files, shapes, quantization.
        build: seconds and peak memory of the build, which differ from build to build.
        structure: of the engines' descriptions; None where they are equal or one is missing.
        graph: of two ONNX graphs; None where they are equal or one is no ONNX graph.
    """

    component: Component
    part: int
    old: str | None
    new: str | None
    changes: tuple[Change, ...] = ()
    build: tuple[Change, ...] = ()
    structure: StructureDiff | None = None
    graph: GraphDiff | None = None

    @property
    def differs(self) -> bool:
        """Whether anything but the figures of the build differs."""
        return bool(None in (self.old, self.new) or self.changes or self.structure or self.graph)


@dataclass(frozen=True, kw_only=True, slots=True)
class VelocityDiff:
    """The velocities of both bundles along the reference's trajectory.

    Attributes:
        golden: name of the golden file; None without one.
        not_run: why the velocities were not compared, a semicolon, and what to do; None where they were.
        steps: of every case.
    """

    golden: str | None
    not_run: str | None
    steps: tuple[StepDistance, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleDiff:
    """Everything that differs between two bundles.

    Attributes:
        old, new: names of the bundles.
        same_model: whether both are of one checkpoint.
        model: name, revision, digest and constants of the model.
        loras: name -> weight and digest.
        recipe: every key of the resolved recipes.
        settings: defaults and limits of requests.
        engines: of every component, also those that are equal.
        modulation: modulation weights that differ.
        files: tokenizer, tables of schedules and calibration.
        version: of qie that built the bundles.
        velocity: error of each step.
    """

    old: str
    new: str
    same_model: bool
    model: tuple[Change, ...]
    loras: tuple[Change, ...]
    recipe: tuple[Change, ...]
    settings: tuple[Change, ...]
    engines: tuple[EngineDiff, ...]
    modulation: tuple[WeightChange, ...]
    files: tuple[Change, ...]
    version: tuple[Change, ...]
    velocity: VelocityDiff = field(default_factory=lambda: VelocityDiff(golden=None, not_run=None))

    @property
    def differs(self) -> bool:
        """Whether anything but the figures of the build differs."""
        tables = (self.model, self.loras, self.recipe, self.settings, self.modulation, self.files, self.version)
        moved = any(step.between != 0 for step in self.velocity.steps)
        return any(map(bool, tables)) or any(engine.differs for engine in self.engines) or moved


def diff_bundles(old: Bundle, new: Bundle, *, progress: StageProgress = no_progress) -> BundleDiff:
    """What differs between two bundles, without running them.

    The content of every file is compared with its digest first: what has equal digests is not read again.

    Args:
        old: an opened bundle.
        new: another one, or the same.
        progress: called with (files checked and engines compared, both in all).

    Raises:
        BundleError: a recipe or any file of a bundle is damaged.
    """
    before, after = old.manifest, new.manifest
    pairs = _pairs(before.engines, after.engines) + _pairs(before.graphs, after.graphs)
    files = [(bundle, file) for bundle in (old, new) for file in bundle.manifest.files()]
    total = len(files) + len(pairs)
    for number, (bundle, file) in enumerate(files):
        progress(number, total)
        check_file(bundle, file)
    engines = []
    for number, (a, b) in enumerate(pairs, len(files)):
        progress(number, total)
        engines.append(_engine(old, new, a, b))
    progress(total, total)
    return BundleDiff(
        old=old.name,
        new=new.name,
        same_model=before.model.digest == after.model.digest,
        model=changes(_model(before.model), _model(after.model)),
        loras=changes(_loras(old), _loras(new)),
        recipe=changes(_recipe(old), _recipe(new)),
        settings=changes(_settings(old), _settings(new)),
        engines=tuple(engines),
        modulation=diff_modulation(old, new),
        files=changes(_files(old), _files(new)),
        version=changes({"qie": before.qie}, {"qie": after.qie}),
    )


def _model(model: ModelRecord) -> dict[str, Any]:
    plain = to_plain(model)
    modulation = plain.pop("modulation")
    kept = {key: modulation[key] for key in ("tables", "layers", "width", "zero_cond_t")}
    return flat(plain) | flat(kept, "modulation")


def _loras(bundle: Bundle) -> dict[str, Any]:
    """LoRAs in their order, which decides the rounding of the weights."""
    loras = bundle.manifest.loras
    return {f"LoRA {number}": f"{lora.name}:{lora.weight:g} {lora.sha256}" for number, lora in enumerate(loras, 1)}


def _recipe(bundle: Bundle) -> dict[str, Any]:
    record = bundle.manifest.recipe
    try:
        table = tomllib.loads(record.toml)
    except tomllib.TOMLDecodeError as problem:
        raise BundleError(
            f"the recipe of {bundle.path} is no TOML ({problem}); build the bundle again with `qie build`"
        ) from None
    return flat(table)


def _settings(bundle: Bundle) -> dict[str, Any]:
    plain = to_plain(bundle.manifest.limits)
    plain["buckets"] = [str(size) for size in bundle.manifest.limits.buckets]
    return flat(to_plain(bundle.manifest.defaults), "defaults") | flat(plain, "limits")


def _files(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    found = {"tokenizer": manifest.tokenizer.sha256, "modulation weights": manifest.model.modulation.identity}
    if manifest.calibration is not None:
        found["calibration"] = manifest.calibration.sha256
    return found | {file.path: file.sha256 for file in manifest.schedules}


def _pairs(old: Sequence[Piece], new: Sequence[Piece]) -> list[tuple[Piece | None, Piece | None]]:
    """Pieces of one component and part beside each other: those of one target first, then whatever is left."""
    pairs: list[tuple[Piece | None, Piece | None]] = []
    parts = {(piece.component, piece.part) for piece in (*old, *new)}
    for component, part in sorted(parts, key=lambda key: (COMPONENTS.index(key[0]), key[1])):
        mine = [piece for piece in old if (piece.component, piece.part) == (component, part)]
        theirs = [piece for piece in new if (piece.component, piece.part) == (component, part)]
        for piece in list(mine):
            same = next((other for other in theirs if _target(other) == _target(piece)), None)
            if same is not None:
                mine.remove(piece)
                theirs.remove(same)
                pairs.append((piece, same))
        shared = min(len(mine), len(theirs))
        pairs += zip(mine[:shared], theirs[:shared], strict=True)
        pairs += [(piece, None) for piece in mine[shared:]] + [(None, piece) for piece in theirs[shared:]]
    return pairs


def _target(piece: Piece) -> str:
    if isinstance(piece, EngineRecord):
        return f"{piece.backend}/{piece.compute_capability}"
    return f"source for {piece.backend}"


def _engine(old: Bundle, new: Bundle, before: Piece | None, after: Piece | None) -> EngineDiff:
    known = before or after
    assert known is not None
    component, part = known.component, known.part
    targets = tuple(None if piece is None else _target(piece) for piece in (before, after))
    if before is None or after is None:
        return EngineDiff(component=component, part=part, old=targets[0], new=targets[1])
    return EngineDiff(
        component=component,
        part=part,
        old=targets[0],
        new=targets[1],
        changes=changes(_facts(before), _facts(after)),
        build=changes(_build(before), _build(after)),
        structure=_structure(old, new, before, after),
        graph=_graph(old, new, before, after),
    )


def _facts(piece: Piece) -> dict[str, Any]:
    """The record of an engine or graph as a flat table."""
    facts: dict[str, Any] = {"target": _target(piece)}
    if isinstance(piece, EngineRecord):
        facts |= {"backend version": piece.backend_version, "activation bytes": piece.activation_bytes}
    facts |= {
        "precision": piece.precision,
        "parameters": piece.parameters,
        "bytes": sum(file.bytes for file in piece.files),
        "key": piece.key,
        **({} if piece.quantization is None else to_plain(piece.quantization)),
        **{f"shapes of {p.input}": [list(p.min), list(p.opt), list(p.max)] for p in piece.profiles},
        **{f"input {spec.name}": f"{spec.dtype} {list(spec.dims)}" for spec in piece.inputs},
        **{f"output {spec.name}": f"{spec.dtype} {list(spec.dims)}" for spec in piece.outputs},
        **{file.path: file.sha256 for file in piece.files},
    }
    if isinstance(piece, EngineRecord) and piece.structure is not None:
        facts[piece.structure.path] = piece.structure.sha256
    return facts


def _build(piece: Piece) -> dict[str, Any]:
    if not isinstance(piece, EngineRecord):
        return {}
    return {"seconds": piece.build_seconds, "peak bytes": piece.build_peak_bytes}


def _structure(old: Bundle, new: Bundle, before: Piece, after: Piece) -> StructureDiff | None:
    if not isinstance(before, EngineRecord) or not isinstance(after, EngineRecord):
        return None
    if before.structure is None or after.structure is None or before.structure.sha256 == after.structure.sha256:
        return None
    found = diff_structures(read_description(old, before), read_description(new, after))
    return found if found.differs else None


def _graph(old: Bundle, new: Bundle, before: Piece, after: Piece) -> GraphDiff | None:
    if not (before.path.endswith(".onnx") and after.path.endswith(".onnx")):
        return None
    if {file.sha256 for file in before.files} == {file.sha256 for file in after.files}:
        return None
    found = diff_graphs(GraphFile(old, before), GraphFile(new, after))
    return found if found.differs else None
