"""Carries out a plan: streams weights, builds engines and packs them into a bundle that is complete or absent."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import qie
from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import Checkpoint, digest_cache
from qie.compiler.checkpoint.lora import fused_reader
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.checkpoint.unread import check_unread
from qie.compiler.packing.sources import write_source
from qie.compiler.packing.take_over import take_over
from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.keys import engine_key, graph_keys, reusable_engines
from qie.compiler.planning.plan import Plan, recipe_schedules
from qie.compiler.quantization import calibration
from qie.compiler.quantization.smoothing import smoothed_reader
from qie.compiler.recipe.schema import Recipe, to_toml
from qie.compiler.weights.modulation import write_modulation
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    Defaults,
    EngineRecord,
    FileRecord,
    GraphRecord,
    LoraRecord,
    Manifest,
    ModelRecord,
    ModulationRecord,
    RecipeRecord,
    file_record,
)
from qie.engines.bundle.sealed import write_manifest
from qie.engines.cache import encoder_cache_on_disk, tables_cache
from qie.engines.errors import BuildError, BundleError
from qie.engines.files import is_disk_full
from qie.engines.folders import replacing_folder
from qie.engines.inputs.modulation import SCHEDULES, BundleModulation, compute_tables, store_tables, table_name
from qie.engines.progress import Progress

__all__ = [
    "build_engine",
    "checkpoint_readers",
    "drop_graph",
    "pack",
    "writing",
]

TOKENIZER_FILE = "tokenizer.json"


def pack(plan: Plan, *, progress: Progress) -> Bundle:
    """Carry out ``plan``, whose checkpoint has its weights; see ``qie.compiler.packing.build.build``.

    Raises:
        QieError: see ``checkpoint_readers``, ``write_weights`` and the builders; nothing half-written is left.
    """
    with writing(plan.destination, plan.disk_bytes) as folder:
        _fill(folder, plan, progress)
    return open_bundle(plan.destination.absolute())


@contextmanager
def writing(destination: Path, needed: int, *, lock: str = MANIFEST) -> Iterator[Path]:
    """A folder that replaces ``destination`` when the block succeeds; ``needed`` bytes are for the error message.

    ``lock``: see ``replacing_folder``.

    Raises:
        BuildError: the folder cannot be written, or the disk is full.
    """
    try:
        with replacing_folder(destination, lock=lock) as folder:
            yield folder
    except OSError as problem:
        if is_disk_full(problem):
            raise BuildError(
                f"the disk of {destination} is full, {needed:,} bytes are needed; free some space or choose a folder "
                "on another disk",
                option="out",
            ) from problem
        raise BuildError(
            f"{destination} cannot be written ({problem}); choose another folder", option="out"
        ) from problem


def checkpoint_readers(plan: Plan) -> Mapping[Subfolder, TensorReader]:
    """Readers of all subfolders: the transformer's with the LoRAs fused, all with the smoothing of the plan.

    Raises:
        CheckpointError: weights are incomplete, or a LoRA does not belong to the model.
    """
    readers = plan.checkpoint.readers()
    if not plan.allow_unread:
        check_unread(readers, plan.read, plan.model)
    if plan.loras:
        readers["transformer"] = fused_reader(readers["transformer"], plan.loras)
    for planned in plan.components:
        if planned.smoothing_groups:
            name = planned.graph.subfolder
            readers[name] = smoothed_reader(readers[name], planned.smoothing_groups, planned.smoothing_scales)
    return readers


def _fill(folder: Path, plan: Plan, progress: Progress) -> None:
    checkpoint, recipe = plan.checkpoint, plan.recipe
    readers = checkpoint_readers(plan)
    digest = checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    if plan.calibration is not None and recipe.quantizes:
        plan.calibration.check_model(digest)
    keys = graph_keys(plan, digest)
    old = _earlier(plan.destination)
    reusable = reusable_engines(plan, keys, old)
    engines: list[EngineRecord] = []
    graphs: list[GraphRecord] = []
    for planned in plan.components:
        source = partial(
            write_source,
            planned,
            plan=plan,
            keys=keys[planned.component],
            readers=readers,
            old=old,
            folder=folder,
            progress=progress,
        )
        waiting: list[GraphRecord] = []
        if planned.finish is not None:
            parts = planned.parts_for(planned.finish)
            waiting = [source(part=part, backend=planned.finish) for part in range(len(parts))]
            graphs += waiting
        if planned.backend is None:
            continue
        kept = waiting if planned.finish is not None and _same_source(planned.finish, planned.backend) else []
        for part in range(len(planned.parts_for(planned.backend))):
            start = time.perf_counter()
            engine = reusable.get((planned.component, part))
            if engine is None or old is None or not take_over(engine_files(engine), old, folder):
                graph = kept[part] if kept else source(part=part, backend=planned.backend)
                engine = build_engine(planned.backend, graph, folder, recipe, progress, plan.device)
                engine = replace(engine, build_seconds=round(time.perf_counter() - start, 3))
                if not kept:
                    drop_graph(graph, engine, folder)
            engines.append(engine)
    modulation = write_modulation(
        plan.model.transformer,
        readers,
        folder,
        tables="bfloat16" if recipe.components.transformer.precision == "bfloat16" else "float32",
        progress=partial(progress, "modulation"),
    )
    load_tokenizer(checkpoint.path).save(str(folder / TOKENIZER_FILE), pretty=False)
    default = plan.model.schedules(recipe)[0]
    manifest = Manifest(
        schema=SCHEMA,
        qie=qie.__version__,
        model=_model_record(checkpoint, digest=digest, modulation=modulation),
        loras=tuple(LoraRecord(name=o.name, sha256=o.digest(), weight=o.weight) for o in plan.loras),
        recipe=RecipeRecord(name=plan.recipe_name, sha256=recipe.digest(), toml=to_toml(recipe.portable())),
        limits=plan.model.limits(recipe),
        defaults=Defaults(
            steps=default.steps,
            guidance=default.guidance,
            noise=recipe.noise,
            residency=recipe.residency,
            specialization=recipe.specialization,
        ),
        tokenizer=file_record(folder, TOKENIZER_FILE),
        calibration=_calibration(folder, plan),
        schedules=_write_schedules(folder, plan, modulation, progress),
        engines=tuple(engines),
        graphs=tuple(graphs),
        planned_bytes=estimate(plan).gpu_bytes,
    )
    write_manifest(manifest, folder)
    if old is not None:
        _drop_cached(old, manifest)


def build_engine(
    backend: str, graph: GraphRecord, folder: Path, recipe: Recipe, progress: Progress, device: int | None = None
) -> EngineRecord:
    """Build an engine of ``graph``, whose files lie in ``folder``, into the same folder, on the GPU ``device``.

    Raises:
        RecipeError, BuildError: see the backend's builder.
    """
    name = graph.path.removesuffix(".onnx") if BACKENDS[backend].source == "graph" else graph.component
    return BUILDERS[backend].build(
        graph,
        folder,
        key=engine_key(graph.key, backend, recipe, graph.profiles),
        recipe=recipe,
        device=device,
        progress=partial(progress, f"compile {name}"),
    )


def drop_graph(graph: GraphRecord, engine: EngineRecord, folder: Path) -> None:
    """Delete the files of ``graph`` that ``engine``, built from it, does not use."""
    for record in graph.files:
        if record not in engine.files:
            (folder / record.path).unlink()
    parent = (folder / graph.path).parent
    if parent != folder and not any(parent.iterdir()):
        parent.rmdir()


def engine_files(engine: EngineRecord) -> tuple[FileRecord, ...]:
    """All files of ``engine`` in its bundle."""
    return engine.files if engine.structure is None else (*engine.files, engine.structure)


def _model_record(checkpoint: Checkpoint, *, digest: str, modulation: ModulationRecord) -> ModelRecord:
    model = checkpoint.model
    return ModelRecord(
        name=checkpoint.name,
        revision=checkpoint.revision,
        digest=digest,
        pipeline=model.pipeline,
        areas=model.areas,
        scheduler=model.scheduler,
        vision=model.processor,
        prompt=model.prompt,
        rotary=model.rotary,
        latent_channels=model.vae.z_dim,
        modulation=modulation,
        about=model.about,
    )


def _calibration(folder: Path, plan: Plan) -> FileRecord | None:
    """A copy of the calibration in ``folder``, where a component is quantized: for reproduction and the next build."""
    if plan.calibration is None or not plan.recipe.quantizes:
        return None
    assert plan.calibration.source is not None
    shutil.copyfile(plan.calibration.source, folder / calibration.FILE)
    return file_record(folder, calibration.FILE)


def _drop_cached(old: Bundle, manifest: Manifest) -> None:
    """Drop what was cached for modulation that the new bundle does not have, and for every engine of ``old``.

    Engines of an equal key may have been damaged when their embeddings were computed.
    """
    modulation = old.manifest.model.modulation.file
    if modulation != manifest.model.modulation.file:
        tables_cache().drop(modulation.sha256)
    for engine in old.manifest.engines:
        encoder_cache_on_disk().drop(engine.key)


def _same_source(one: str, other: str) -> bool:
    return BACKENDS[one].source == BACKENDS[other].source


def _earlier(destination: Path) -> Bundle | None:
    """The bundle at ``destination``; None where there is none, or it does not open."""
    if not (destination / MANIFEST).is_file():
        return None
    try:
        return open_bundle(destination.absolute())
    except BundleError:
        return None


def _write_schedules(
    folder: Path, plan: Plan, modulation: ModulationRecord, progress: Progress
) -> tuple[FileRecord, ...]:
    """The modulation tables of the recipe's schedules."""
    schedules = recipe_schedules(plan.model, plan.recipe)
    records = []
    weights = BundleModulation(folder, modulation)
    for number, values in enumerate(schedules):
        name = f"{SCHEDULES}/{table_name(modulation, values)}"
        store_tables(compute_tables(weights, modulation, values), modulation, folder / name)
        records.append(file_record(folder, name))
        progress("schedules", number + 1, len(schedules))
    return tuple(records)
