"""The graphs of a bundle, built again from its checkpoint in float32 for onnxruntime on the CPU.

Engines run on their GPU alone. What a machine without it can judge is the graph that they were built from: the same
layers, the same quantization with the same scales, computed in float32. ``other_graphs`` says of which engines that is
not known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qie.compiler.checkpoint.checkpoint import POCKET, Checkpoint, digest_cache, open_checkpoint
from qie.compiler.checkpoint.lora import Lora
from qie.compiler.packing.export import export_graphs
from qie.compiler.packing.made_from import bundle_loras
from qie.compiler.planning.keys import engine_key, graph_keys, source_key, whole_key
from qie.compiler.planning.plan import Plan, make_plan
from qie.compiler.planning.profiles import profiles
from qie.compiler.planning.resolve import LoraSource
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.recipe.schema import DIVISIBLE, Components, Recipe
from qie.compiler.validation.golden.match import is_of_pocket
from qie.compiler.validation.onnx_file import calibration_of
from qie.engines.backends import BACKENDS
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, GraphRecord, ProfileRecord
from qie.engines.errors import CheckpointError
from qie.engines.files import sha256_of
from qie.engines.machine import this_machine
from qie.engines.progress import Progress, no_progress

__all__ = ["Rebuild", "cpu_recipe", "find_model", "other_contents", "other_graphs", "plan_rebuild"]


def find_model(bundle: Bundle) -> str | None:
    """The model of ``bundle`` where it is known without being named: pocket, which comes with qie; else None."""
    return str(POCKET) if is_of_pocket(bundle) else None


def cpu_recipe(recipe: Recipe) -> Recipe:
    """``recipe`` for onnxruntime on the CPU in float32, with its schemes, sizes and gates, and any schedule."""
    sections = {
        name: replace(recipe.components[name], precision="float32", backend=None, parts=None) for name in COMPONENTS
    }
    return replace(
        recipe,
        gpu="CPU",
        compute_capability=None,
        memory_gib=max(0.25, this_machine().memory_gib),
        backends=("onnxruntime",),
        specialization="none",
        modulation="weights",
        residency="resident",
        components=Components(**sections),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuild:
    """The plans of two builds from the checkpoint of a bundle.

    Attributes:
        own: of the bundle itself.
        cpu: of its graphs in float32, for onnxruntime on the CPU.
    """

    own: Plan
    cpu: Plan


def plan_rebuild(
    bundle: Bundle,
    recipe: Recipe,
    model: str,
    destination: Path,
    *,
    loras: Sequence[LoraSource] = (),
    progress: Progress = no_progress,
) -> Rebuild:
    """Plan the build of the graphs of ``bundle`` from the checkpoint ``model`` into the folder ``destination``.

    Args:
        bundle: an opened bundle.
        recipe: of its manifest.
        model: folder or hub id of its checkpoint.
        destination: an empty folder.
        loras: those of the bundle, in their order.
        progress: called with what is read, bytes done and bytes in all.

    Raises:
        CheckpointError: the checkpoint or a LoRA is not the bundle's.
        QieError: see ``make_plan``.
    """
    manifest = bundle.manifest
    checkpoint = open_checkpoint(model, weights=False).with_weights(progress=partial(progress, "download"))
    digest = checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    if digest != manifest.model.digest:
        raise CheckpointError(
            f"{model} has the digest {digest[:12]}, and {bundle.name} was built from {manifest.model.name} with "
            f"{manifest.model.digest[:12]}; name the checkpoint of the bundle",
            option="model",
        )
    opened = bundle_loras(bundle, loras)
    calibration = calibration_of(bundle)
    divided = _in_parts_of(bundle, recipe)
    own = _plan(checkpoint, manifest.recipe.name, divided, opened, calibration, destination)
    if own.model.scheduler != manifest.model.scheduler:  # a schedule that was chosen by name, not by the LoRAs
        raise CheckpointError(
            f"{bundle.name} has another noise schedule than {model} with its LoRAs, chosen by name; build it "
            "again without choosing one",
            option="model",
        )
    cpu = _plan(checkpoint, "cpu", cpu_recipe(recipe), opened, calibration, destination)
    return Rebuild(own=own, cpu=cpu)


def _in_parts_of(bundle: Bundle, recipe: Recipe) -> Recipe:
    """``recipe`` with as many parts of each component as ``bundle`` has; a plan would choose by this machine."""
    records: list[EngineRecord | GraphRecord] = [*bundle.manifest.engines, *bundle.manifest.graphs]
    sections = {name: recipe.components[name] for name in COMPONENTS}
    for name in DIVISIBLE:
        last = max((record.part for record in records if record.component == name), default=0)
        sections[name] = replace(sections[name], parts=last + 1)
    return replace(recipe, components=Components(**sections))


def other_graphs(bundle: Bundle, plan: Plan, folder: Path, *, progress: Progress = no_progress) -> list[str]:
    """What of ``bundle`` is not of the graphs of ``plan``, as sentences.

    The key of an engine is a digest of its graph, weights, target and tool versions (``qie.compiler.planning.keys``).
    The ONNX graphs of the bundle, those that wait for their engine among them, are also written again into ``folder``
    and compared by their digests, and so are the constants of the model.
    """
    return [
        *_other_keys(bundle, plan, progress),
        *_other_files(bundle, plan, folder, progress),
        *_other_model(bundle, plan),
    ]


def _other_keys(bundle: Bundle, plan: Plan, progress: Progress) -> Iterator[str]:
    checkpoint = plan.checkpoint
    digest = checkpoint.digest(cache=digest_cache(), progress=partial(progress, "digest of the checkpoint"))
    graphs = graph_keys(plan, digest)
    planned = {p.component: p for p in plan.components}

    def source_of(record: EngineRecord | GraphRecord) -> tuple[str, tuple[ProfileRecord, ...]] | None:
        """Key and shapes of what ``record`` is built from under the plan; None where the plan has no such part."""
        source, parts = BACKENDS[record.backend].source, planned[record.component].parts_for(record.backend)
        if record.part >= len(parts):
            return None
        shapes, keys = profiles(parts[record.part], plan.recipe, plan.model), graphs[record.component]
        return source_key(keys[record.part] if source == "graph" else whole_key(keys), source, shapes), shapes

    for engine in bundle.manifest.engines:
        found, version = source_of(engine), engine.backend_version
        if found is None or engine.key != engine_key(found[0], engine.backend, plan.recipe, found[1], version=version):
            yield f"{engine.component} was built from another graph, or by another version of qie or ONNX"
    for waiting in bundle.manifest.graphs:
        found = source_of(waiting)
        if found is None or waiting.key != found[0]:
            yield f"what {waiting.component} is built from is another one, or of another version of qie or ONNX"


def _other_files(bundle: Bundle, plan: Plan, folder: Path, progress: Progress) -> Iterator[str]:
    """The files of ONNX graphs in ``bundle`` that are not what the plan writes."""
    engines = [engine for engine in bundle.manifest.engines if not BACKENDS[engine.backend].compiles]
    records: list[EngineRecord | GraphRecord] = [*bundle.manifest.graphs, *engines]
    if not records:
        return
    export_graphs(replace(plan, destination=folder), weights=True, in_parts=True, progress=progress)
    for record in records:
        for file in record.files:
            if not (folder / file.path).is_file() or sha256_of(folder / file.path) != file.sha256:
                yield f"{file.path} of {record.component} is not what its checkpoint and recipe give"


def _other_model(bundle: Bundle, plan: Plan) -> Iterator[str]:
    """The constants in the manifest that are not the model's, and another default or limit."""
    model, found = plan.model, bundle.manifest.model
    expected = {
        "pipeline": model.pipeline, "areas": model.areas, "scheduler": model.scheduler, "vision": model.processor,
        "prompt": model.prompt, "rotary": model.rotary, "latent_channels": model.vae.z_dim,
    }  # fmt: skip
    for name, value in expected.items():
        if getattr(found, name) != value:
            yield f"the manifest has another {name} than the checkpoint"
    default = model.schedules(plan.recipe)[0]
    if (bundle.manifest.defaults.steps, bundle.manifest.defaults.guidance) != (default.steps, default.guidance):
        yield f"the defaults of an edit are not {default.steps} steps with guidance {default.guidance:g}"
    if bundle.manifest.limits != model.limits(plan.recipe):
        yield "the limits in the manifest are not those of the recipe"


def other_contents(bundle: Bundle, rebuilt: Bundle) -> list[str]:
    """What ``bundle`` has beside its engines and is not what its checkpoint gives, as sentences."""
    manifests = bundle.manifest, rebuilt.manifest
    found = {
        "the tokenizer": [manifest.tokenizer.sha256 for manifest in manifests],
        "the modulation": [manifest.model.modulation.identity for manifest in manifests],
    }
    return [f"{what} is not that of its checkpoint" for what, (own, other) in found.items() if own != other]


def _plan(
    checkpoint: Checkpoint,
    name: str,
    recipe: Recipe,
    loras: Sequence[Lora],
    calibration: Calibration | None,
    destination: Path,
) -> Plan:
    return make_plan(
        checkpoint,
        recipe_name=name,
        recipe=recipe,
        loras=loras,
        destination=destination,
        calibration=calibration,
        allow_unread=True,
    )
