"""Carries out a plan: streams weights, builds engines, and packs everything into a bundle that is whole or absent."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import qie
from qie.compiler.build import BUILDERS
from qie.compiler.configs import TransformerConfig
from qie.compiler.graphs.weight import Part
from qie.compiler.lora import fused_reader
from qie.compiler.model import areas, model_record
from qie.compiler.modulation import write_modulation
from qie.compiler.plan import Plan, check_buildable, component_keys, kept_engines, recipe_schedules
from qie.compiler.recipe import to_toml
from qie.compiler.safetensor import TensorReader
from qie.compiler.tokenizer import load_tokenizer
from qie.engines.bundle import Bundle, open_bundle
from qie.engines.errors import BuildError, BundleError
from qie.engines.files import qie_home, replacing_folder, sha256_of
from qie.engines.manifest import (
    MANIFEST,
    SCHEMA,
    Defaults,
    EngineRecord,
    FileRecord,
    LoraRecord,
    Manifest,
    ModulationRecord,
    RecipeRecord,
    write_manifest,
)
from qie.engines.modulation import SCHEDULES, compute_tables, store_tables, table_name

__all__ = ["build_bundle", "checkpoint_readers", "writing"]

Progress = Callable[[str, int, int], None]

TOKENIZER_FILE = "tokenizer.json"


def build_bundle(plan: Plan, *, progress: Progress = lambda what, done, total: None) -> Bundle:
    """Build the bundle of ``plan`` and put it at its destination, in place of an earlier one.

    Engines of the earlier bundle with an equal key and undamaged files are kept. ``progress`` is called with
    (what is being done, bytes or units done, bytes or units in all).

    Raises:
        QieError: see ``check_buildable``, ``write_weights`` and the builders; nothing half-written is left.
    """
    check_buildable(plan)
    with writing(plan) as folder:
        _fill(folder, plan, progress)
    return open_bundle(str(plan.destination))


@contextmanager
def writing(plan: Plan) -> Iterator[Path]:
    """A folder that takes the place of the plan's destination when the block ends well.

    Raises:
        BuildError: it cannot be written, or the disk is full.
    """
    try:
        with replacing_folder(plan.destination) as folder:
            yield folder
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise BuildError(
                f"the disk of {plan.destination} is full, {plan.bytes:,} bytes are needed; make room, or choose "
                "another disk with --out"
            ) from problem
        raise BuildError(f"cannot write {plan.destination} ({problem}); choose another place with --out") from problem


def checkpoint_readers(plan: Plan) -> Mapping[Part, TensorReader]:
    """Readers of all parts, the transformer's with the LoRAs fused.

    Raises:
        CheckpointError: weights are incomplete, or a LoRA does not belong to the model.
    """
    readers: dict[Part, TensorReader] = {
        part: plan.checkpoint.reader(part) for part in ("transformer", "text_encoder", "vae")
    }
    if plan.loras:
        readers["transformer"] = fused_reader(readers["transformer"], plan.loras)
    return readers


def _fill(folder: Path, plan: Plan, progress: Progress) -> None:
    checkpoint, recipe = plan.checkpoint, plan.recipe
    readers = checkpoint_readers(plan)
    digest = checkpoint.digest(
        cache=qie_home() / "digests.json", progress=partial(progress, "digest of the checkpoint")
    )
    keys = component_keys(plan, digest)
    old = _earlier(plan.destination)
    kept = kept_engines(plan, keys, old)
    engines = []
    for part in plan.components:
        record = kept.get(part.component)
        if old is not None and record is not None and _take_over(record, old.path, folder):
            engines.append(record)
            continue
        assert part.backend is not None
        engines.append(
            BUILDERS[part.backend].build(
                part.graph,
                readers,
                folder,
                key=keys[part.component],
                progress=partial(progress, part.component),
            )
        )
    modulation = write_modulation(
        TransformerConfig.from_config(checkpoint.transformer),
        readers,
        folder,
        tables="bfloat16" if recipe.components.transformer.precision == "bfloat16" else "float32",
        progress=partial(progress, "modulation"),
    )
    load_tokenizer(checkpoint).save(str(folder / TOKENIZER_FILE), pretty=False)
    default = recipe.schedules[0]
    manifest = Manifest(
        schema=SCHEMA,
        qie=qie.__version__,
        model=model_record(checkpoint, digest=digest, modulation=modulation),
        loras=tuple(LoraRecord(name=o.name, sha256=o.digest(), weight=o.weight) for o in plan.loras),
        recipe=RecipeRecord(name=plan.recipe_name, sha256=recipe.digest(), toml=to_toml(recipe)),
        limits=recipe.shape_limits(areas(checkpoint).vae_area),
        defaults=Defaults(
            steps=default.steps, guidance=default.guidance, noise=recipe.noise, residency=recipe.residency
        ),
        tokenizer=_record(folder, TOKENIZER_FILE),
        schedules=_write_schedules(folder, plan, modulation, progress),
        engines=tuple(engines),
    )
    _sync(folder)
    write_manifest(manifest, folder)
    _sync(folder / MANIFEST)


def _earlier(destination: Path) -> Bundle | None:
    """The bundle at ``destination``, where there is one that opens."""
    if not (destination / MANIFEST).is_file():
        return None
    try:
        return open_bundle(str(destination))
    except BundleError:
        return None


def _take_over(engine: EngineRecord, old: Path, folder: Path) -> bool:
    """Link the files of ``engine`` from the earlier bundle; False where one is not what was built."""
    if any(sha256_of(old / record.path) != record.sha256 for record in engine.files):
        return False
    for record in engine.files:
        try:
            os.link(old / record.path, folder / record.path)
        except OSError:
            shutil.copyfile(old / record.path, folder / record.path)
    return True


def _write_schedules(
    folder: Path, plan: Plan, modulation: ModulationRecord, progress: Progress
) -> tuple[FileRecord, ...]:
    """The modulation tables of the recipe's schedules."""
    schedules = recipe_schedules(plan.checkpoint, plan.recipe)
    records = []
    for number, values in enumerate(schedules):
        name = f"{SCHEDULES}/{table_name(modulation, values)}"
        store_tables(compute_tables(folder, modulation, values), modulation, folder / name)
        records.append(_record(folder, name))
        progress("schedules", number + 1, len(schedules))
    return tuple(records)


def _record(folder: Path, name: str) -> FileRecord:
    path = folder / name
    return FileRecord(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
