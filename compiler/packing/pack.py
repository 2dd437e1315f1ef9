"""Carries out a plan: makes the pieces of a bundle and puts them together in a folder that is complete or absent."""

import shutil
from functools import partial
from pathlib import Path

import qie
from qie.compiler.checkpoint.checkpoint import Checkpoint, digest_cache
from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.compiler.packing.items import items
from qie.compiler.packing.make import make_pieces
from qie.compiler.packing.pieces import Piece, Pieces
from qie.compiler.packing.readers import checkpoint_readers
from qie.compiler.packing.schedules import ModulationPiece, take_modulation
from qie.compiler.packing.writing import writing
from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.keys import graph_keys, modulation_key
from qie.compiler.planning.plan import Plan
from qie.compiler.quantization.calibration import FILE, Calibration
from qie.compiler.recipe.schema import to_toml
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    Defaults,
    LoraRecord,
    Manifest,
    ModelRecord,
    ModulationRecord,
    RecipeRecord,
    file_record,
)
from qie.engines.bundle.sealed import write_manifest
from qie.engines.cache import encoder_cache_on_disk, tables_cache
from qie.engines.errors import BundleError, CalibrationError
from qie.engines.progress import Progress

__all__ = ["pack"]

TOKENIZER_FILE = "tokenizer.json"


def pack(plan: Plan, pieces: Pieces, *, progress: Progress) -> Bundle:
    """Carry out ``plan``, whose checkpoint has its weights; see ``qie.compiler.packing.build.build``.

    Args:
        plan: of the build.
        pieces: what an earlier attempt made, and where this one makes its own.
        progress: see ``build``.

    Raises:
        QieError: see ``checkpoint_readers``, ``make_pieces`` and the builders; nothing half-written is left.
    """
    old = _earlier(plan.destination)
    made, digest = _pieces(plan, pieces, old, progress)
    with writing(plan.destination, plan.disk_bytes) as folder:
        manifest = _manifest(plan, folder, digest, tuple(made.values()))
        for key, piece in made.items():
            pieces.place(key, piece, folder)
        write_manifest(manifest, folder)
        if old is not None:
            _drop_cached(old, manifest)
    return open_bundle(plan.destination.absolute())


def _pieces(plan: Plan, pieces: Pieces, old: Bundle | None, progress: Progress) -> tuple[dict[str, Piece], str]:
    """Make what ``pieces`` lacks: the pieces by their keys, in the order of the plan, and the checkpoint's digest."""
    readers = checkpoint_readers(plan)
    digest = plan.checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    calibration = plan.calibration if plan.recipe.quantizes else None
    wanted = items(plan, graph_keys(plan, digest))
    modulation = modulation_key(plan, digest)
    keys = [*(item.key for item in wanted), modulation]
    if plan.checkpoint.fetched is not None:
        plan.checkpoint.fetched.close()  # its shard lies among the pieces
    pieces.retain([*keys, *([] if calibration is None else [str(calibration.sha256)])])
    if calibration is not None:
        calibration.check_model(digest)
        keys.append(_keep_calibration(calibration, pieces))
    has_tables = pieces.find(modulation) is not None or take_modulation(plan, modulation, pieces, old)
    tables = None if has_tables else ModulationPiece(plan, modulation, pieces, readers)
    make_pieces(plan, wanted, pieces, readers, old, tables, progress=progress)
    made = {key: pieces.find(key) for key in keys}
    assert None not in made.values()
    return {key: piece for key, piece in made.items() if piece is not None}, digest


def _manifest(plan: Plan, folder: Path, digest: str, made: tuple[Piece, ...]) -> Manifest:
    """The manifest of ``made``; writes the tokenizer into ``folder``."""
    checkpoint, recipe = plan.checkpoint, plan.recipe
    load_tokenizer(checkpoint.path).save(str(folder / TOKENIZER_FILE), pretty=False)
    default = plan.model.schedules(recipe)[0]
    modulation = next(piece for piece in made if piece.modulation is not None)
    assert modulation.modulation is not None
    return Manifest(
        schema=SCHEMA,
        qie=qie.__version__,
        model=_model_record(checkpoint, digest=digest, modulation=modulation.modulation),
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
        calibration=next((record for piece in made for record in piece.files if record.path == FILE), None),
        schedules=modulation.files,
        engines=tuple(engine for piece in made for engine in piece.engines),
        graphs=tuple(graph for piece in made for graph in piece.graphs),
        planned_bytes=estimate(plan).gpu_bytes,
    )


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


def _keep_calibration(calibration: Calibration, pieces: Pieces) -> str:
    """Make a copy of ``calibration`` a piece, before anything is made with it: for reproduction and the next build.

    Returns:
        The key of the piece.

    Raises:
        CalibrationError: its file was changed since it was read.
    """
    assert calibration.source is not None
    key = str(calibration.sha256)
    if pieces.find(key) is not None:
        return key
    work = pieces.begin(key)
    try:
        shutil.copyfile(calibration.source, work / FILE)
        record = file_record(work, FILE)
    except FileNotFoundError:
        record = None
    if record is None or record.sha256 != key:
        raise CalibrationError(f"{calibration.source} was changed or deleted since it was read; start again")
    pieces.keep(key, Piece(files=(record,)))
    return key


def _drop_cached(old: Bundle, manifest: Manifest) -> None:
    """Drop what was cached for modulation that the new bundle does not have, and for every engine of ``old``.

    Engines of an equal key may have been damaged when their embeddings were computed.
    """
    modulation = old.manifest.model.modulation
    if modulation.identity != manifest.model.modulation.identity:
        tables_cache().drop(modulation.identity)
    for engine in old.manifest.engines:
        encoder_cache_on_disk().drop(engine.key)


def _earlier(destination: Path) -> Bundle | None:
    """The bundle at ``destination``; None where there is none, or it does not open."""
    if not (destination / MANIFEST).is_file():
        return None
    try:
        return open_bundle(destination.absolute())
    except BundleError:
        return None
