"""Where a report comes from: bundle, golden file, machine and packages."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qie.compiler.recipe.gates import flat
from qie.compiler.recipe.load import load_recipe, recipe_names
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.checks.registry import CHECKS
from qie.compiler.validation.report import Provenance
from qie.compiler.validation.subject import Subject
from qie.engines.backends import package_versions
from qie.engines.bundle.manifest import MANIFEST, Component, EngineRecord, titles
from qie.engines.files import sha256_of
from qie.engines.machine import this_machine

__all__ = ["damaged_provenance", "executed_name", "provenance"]


def executed_name(engines: Mapping[Component, tuple[EngineRecord, ...]]) -> str:
    """What executes, such as ``onnxruntime 1.32.0, CPU``."""
    found = dict.fromkeys(
        f"{e.backend} {e.backend_version}, {'CPU' if e.compute_capability == 'cpu' else 'GPU'}"
        for parts in engines.values()
        for e in parts
    )
    return ", ".join(found)


def provenance(subject: Subject) -> Provenance:
    """The provenance of a report on ``subject``."""
    bundle, golden, executed = subject.bundle, subject.golden, subject.executed
    manifest = bundle.manifest
    return Provenance(
        bundle=str(bundle.path),
        manifest=bundle.folder.read(lambda folder: sha256_of(folder / MANIFEST)),
        model=manifest.model.name,
        checkpoint=manifest.model.digest,
        loras=tuple(f"{lora.name}:{lora.weight:g}" for lora in manifest.loras),
        recipe=manifest.recipe.name,
        recipe_digest=manifest.recipe.sha256,
        engines=tuple(
            f"{name}: {e.backend} {e.backend_version}, {e.compute_capability}"
            for name, e in zip(titles(manifest.engines), manifest.engines, strict=True)
        ),
        ran=None if executed is None else executed.on,
        golden=None if golden is None else str(golden.path),
        golden_digest=None if golden is None else golden.record.tensors,
        reference=() if golden is None else golden.record.packages,
        machine=this_machine(),
        packages=package_versions(),
        rebuilt=executed is not None and executed.rebuilt,
        looser_gates=tuple(_looser(subject.recipe, manifest.recipe.name)),
    )


def _looser(recipe: Recipe, name: str) -> Iterator[str]:
    """The gates of ``recipe`` that are looser than those of the recipe ``name`` that comes with qie, where one does."""
    if name.lower() not in recipe_names():
        return
    own, shipped = flat(recipe.gates), flat(load_recipe(name).gates)
    for spec in CHECKS:
        if spec.gate is not None:
            bound, other = own[spec.gate], shipped[spec.gate]
            if bound > other if spec.sense == "at most" else bound < other:
                yield f"{spec.gate} is {bound:g}, in the recipe {name} that comes with qie {other:g}"


def damaged_provenance(path: Path) -> Provenance:
    """The provenance of a report on the bundle at ``path``, which cannot be opened."""
    try:
        manifest = sha256_of(path / MANIFEST)
    except OSError:
        manifest = "unknown"
    return Provenance(
        bundle=str(path),
        manifest=manifest,
        model="unknown",
        checkpoint="unknown",
        loras=(),
        recipe="unknown",
        recipe_digest="unknown",
        engines=(),
        ran=None,
        golden=None,
        golden_digest=None,
        reference=(),
        machine=this_machine(),
        packages=package_versions(),
    )
