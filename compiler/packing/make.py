"""Makes the pieces of a bundle: weights in one pass over the files, and each engine as soon as it has its own."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from qie.compiler.packing.engines import build_engine, engine_files
from qie.compiler.packing.items import Item, Target
from qie.compiler.packing.pieces import Piece, Pieces
from qie.compiler.packing.readers import Readers
from qie.compiler.packing.schedules import ModulationPiece
from qie.compiler.packing.sources import weights_name, write_graph_source, write_other_source
from qie.compiler.packing.take_over import take_over
from qie.compiler.planning.plan import Plan
from qie.compiler.recipe.schema import BackendName
from qie.compiler.weights.prepare import check_weights
from qie.compiler.weights.stream import stream
from qie.compiler.weights.weights_file import WeightFile, WeightsFile
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.progress import Progress

__all__ = ["make_pieces"]


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """An item that is being made in the folder ``work``: what an earlier bundle had of it, and the weights so far."""

    item: Item
    work: Path
    engines: dict[Target, EngineRecord] = field(default_factory=dict)
    graphs: dict[Target, GraphRecord] = field(default_factory=dict)
    written: dict[Target, WeightFile] = field(default_factory=dict)
    seconds: dict[Target, float] = field(default_factory=dict)

    def lacking(self) -> list[Target]:
        """The targets of which a source or an engine has to be made."""
        return [
            target
            for target in self.item.targets
            if (target.finish is not None and target not in self.graphs)
            or (target.backend is not None and target not in self.engines and target not in self.graphs)
        ]


def make_pieces(
    plan: Plan,
    items: Sequence[Item],
    pieces: Pieces,
    readers: Readers,
    old: Bundle | None,
    modulation: ModulationPiece | None,
    *,
    progress: Progress,
) -> None:
    """Make every piece of ``items`` that ``pieces`` lacks.

    The files of a subfolder are read once, but for those of a source that is no graph. An engine is built as soon as
    its weights are complete, and they are deleted before more is read. Where the files have neighboring parts mixed,
    the weights of two are on the disk.

    Args:
        plan: of the build.
        items: what is built.
        pieces: where the pieces go; what an earlier attempt left is in it.
        readers: of the checkpoint, with everything folded into its tensors.
        old: an earlier bundle, whose engines are taken over where their keys are equal; None without one.
        modulation: what is made of the modulation weights, in the same pass; None where that piece is there.
        progress: called with (kind of work, bytes or units done, bytes or units in all).

    Raises:
        QieError: see the writers and builders.
        OSError: the disk is full or cannot be written.
    """
    absent = [item for item in items if pieces.find(item.key, progress=partial(progress, "verify")) is None]
    jobs = [_begin(item, pieces, old) for item in absent]
    graphs = [(job, t) for job in jobs for t in job.lacking() if t.source == "graph"]
    check_weights([weight for _, target in graphs for weight in target.graph.weights], readers)
    waiting = {WeightsFile(t.graph.weights, job.work / weights_name(t)): (job, t) for job, t in graphs}
    for job in jobs:
        if all(other is not job for other, _ in graphs):
            _complete(job, plan, readers, pieces, progress)
    for subfolder in dict.fromkeys(planned.graph.subfolder for planned in plan.components):
        files = [file for file, (_, target) in waiting.items() if target.graph.subfolder == subfolder]
        tables = [modulation] if modulation is not None and subfolder == "transformer" else []
        first = [name for each in tables for name in each.first]
        report = partial(progress, f"weights of {subfolder}")
        with ExitStack() as stack:
            for file in files:
                stack.callback(file.close)
            for consumer in stream([*files, *tables], readers, subfolder, first=first, progress=report):
                if isinstance(consumer, WeightsFile):
                    job, target = waiting.pop(consumer)
                    job.written[target] = consumer.written
                    if not any(other is job for other, _ in waiting.values()):
                        _complete(job, plan, readers, pieces, progress)


def _begin(item: Item, pieces: Pieces, old: Bundle | None) -> _Job:
    """Start on ``item`` with what ``old`` has of it."""
    job = _Job(item=item, work=pieces.begin(item.key))
    if old is None:
        return job
    for target in item.targets:
        for engine in old.manifest.engines:
            if engine.key == target.engine and take_over(engine_files(engine), old, job.work):
                job.engines[target] = engine
        for graph in old.manifest.graphs if target.finish is not None else ():
            if graph.key == target.key and take_over(graph.files, old, job.work):
                job.graphs[target] = replace(graph, backend=str(target.finish), profiles=target.shapes)
    return job


def _complete(job: _Job, plan: Plan, readers: Readers, pieces: Pieces, progress: Progress) -> None:
    """Build what ``job`` still lacks, and keep it."""
    for target in job.lacking():
        start = time.perf_counter()
        backend = target.finish or target.backend
        assert backend is not None
        job.graphs[target] = _source(job, target, backend, plan, readers, progress)
        job.seconds[target] = time.perf_counter() - start
    for target in job.item.targets:
        if target.backend is not None and target not in job.engines:
            start = time.perf_counter()
            graph = replace(job.graphs[target], backend=target.backend)
            engine = build_engine(target.backend, graph, job.work, plan.recipe, progress, plan.device)
            seconds = job.seconds.get(target, 0.0) + time.perf_counter() - start
            job.engines[target] = replace(engine, build_seconds=round(seconds, 3))
    job.graphs = {target: graph for target, graph in job.graphs.items() if target.finish is not None}
    stay = {record.path for graph in job.graphs.values() for record in graph.files}
    stay |= {record.path for engine in job.engines.values() for record in engine_files(engine)}
    for entry in sorted(job.work.rglob("*"), reverse=True):
        if entry.is_dir():
            if not any(entry.iterdir()):
                entry.rmdir()
        elif entry.relative_to(job.work).as_posix() not in stay:
            entry.unlink()
    targets = job.item.targets
    engines = tuple(job.engines[target] for target in targets if target in job.engines)
    graphs = tuple(job.graphs[target] for target in targets if target in job.graphs)
    pieces.keep(job.item.key, Piece(engines=engines, graphs=graphs))


def _source(
    job: _Job, target: Target, backend: BackendName, plan: Plan, readers: Readers, progress: Progress
) -> GraphRecord:
    """Write what the engine of ``backend`` is made from."""
    if target.source == "graph":
        return write_graph_source(target, job.written[target], job.work, backend)
    return write_other_source(target, plan, readers, job.work, backend, progress=progress)
