"""From the names that a person gives to a plan: model, recipe, LoRAs, calibration and destination.

What needs ``qie[compile]`` is imported inside the functions, so that its absence becomes one sentence.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qie.engines.bundle.bundle import bundles_folder
from qie.engines.errors import BackendMissingError, BuildError
from qie.engines.files import is_link_loop

if TYPE_CHECKING:
    from qie.compiler.planning.plan import Plan
    from qie.compiler.quantization.calibration import Calibration

__all__ = ["LoraSource", "bundle_name", "compile_packages", "plan_build", "with_calibration"]

LoraSource = str | Path | tuple[str | Path, float]
"""A LoRA to fuse: ``"PATH"``, ``"PATH:WEIGHT"`` or (path, weight)."""

_NAME = re.compile(r"\w[\w.-]*")

_LONGEST_NAME = 80
"""Characters of a default name."""


def plan_build(
    model: str | Path,
    *,
    gpu: str | Path = "cpu",
    loras: Sequence[LoraSource] = (),
    calibration: str | Path | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    schedule: str | None = None,
    allow_unread: bool = False,
    device: int | None = None,
    language: str | None = None,
    memory_gib: float | None = None,
) -> "Plan":
    """Plan the build of a bundle. Of a hub id only the configs are downloaded.

    Args:
        model: folder in diffusers format, hub id, or ``"pocket"``, the small model that comes with qie.
        gpu: recipe, by name or by path of a .toml file.
        loras: LoRAs to fuse into the transformer, in this order; the weight is 1 where none is given.
        calibration: file written by ``qie calibrate``; None for the recipe's, else the checkpoint's own,
            which is read where the recipe quantizes. Where there is none, the build makes one.
        out: folder of the bundle; None for a folder by name in ``$QIE_HOME/bundles``.
        name: name of the bundle there; None for MODEL-GPU, and after it ``language`` and the LoRAs.
        revision: branch, tag or commit of a hub id.
        schedule: that a distilled LoRA was trained for: "lightning", "lightning-4", "lightning-8", or "checkpoint" for
            the checkpoint's own; None for what the LoRAs say.
        allow_unread: accept tensors of the checkpoint that nothing reads.
        device: CUDA index of the GPU to build on, where TensorRT builds; None for the first that fits the recipe.
        language: backend of the language model, before those of the recipe; None for the recipe's.
        memory_gib: host memory that the build may use: what does not fit is built in parts. None for nine tenths of
            this machine's, and no more than the recipe says.

    Raises:
        BackendMissingError: ``qie[compile]`` is not installed.
        RecipeError: there is no such recipe, or it is malformed.
        CheckpointError: the checkpoint or a LoRA is missing, incomplete or malformed.
        CalibrationError: the calibration is missing, damaged or lacks a linear.
        ExportError: the graphs do not express the model.
        BuildError: the name cannot be a bundle's, no folder can be at ``out``, or no build can have that much memory.
    """
    with compile_packages():
        from qie.compiler.checkpoint.checkpoint import open_checkpoint
        from qie.compiler.checkpoint.lora import open_lora, parse_lora
        from qie.compiler.planning.plan import make_plan
        from qie.compiler.quantization.calibration import find_calibration
        from qie.compiler.recipe.load import load_recipe, with_backend

    if name is not None and not _NAME.fullmatch(name):
        raise BuildError(
            f"the name of the bundle is {name!r}, expected letters, digits, dots and dashes; choose another name",
            option="name",
        )
    recipe_name = str(gpu)
    recipe = load_recipe(recipe_name)
    if language is not None:
        recipe = with_backend(recipe, "language", language)
    checkpoint = open_checkpoint(str(model), revision=revision, weights=False)
    weighted = [source if isinstance(source, tuple) else parse_lora(str(source)) for source in loras]
    opened = [open_lora(Path(path), weight) for path, weight in weighted]
    parts = [*([] if language is None else [language]), *(lora.path.stem for lora in opened)]
    default = bundle_name(checkpoint.name, recipe_name, parts)
    destination = bundles_folder() / (name or default) if out is None else Path(out)
    if is_link_loop(destination):
        raise BuildError(f"{destination} is a link that leads back to itself; choose another folder", option="out")
    given = calibration or recipe.calibration
    return make_plan(
        checkpoint,
        recipe_name=recipe_name,
        recipe=recipe,
        loras=opened,
        destination=destination,
        calibration=find_calibration(given, checkpoint.path) if given or recipe.quantizes else None,
        schedule=schedule,
        allow_unread=allow_unread,
        device=device,
        memory_gib=memory_gib,
    )


def with_calibration(plan: "Plan", calibration: "Calibration | None") -> "Plan":
    """``plan``, planned again with ``calibration``, or for one that is still to be made.

    Raises:
        QieError: see ``make_plan``.
    """
    from qie.compiler.planning.plan import make_plan

    return make_plan(
        plan.checkpoint,
        recipe_name=plan.recipe_name,
        recipe=plan.recipe,
        loras=plan.loras,
        destination=plan.destination,
        calibration=calibration,
        schedule=plan.schedule,
        allow_unread=plan.allow_unread,
        device=plan.device,
        memory=plan.memory,
    )


def bundle_name(checkpoint_name: str, recipe_name: str, more: Sequence[str] = ()) -> str:
    """The default name of a bundle: the last part of the checkpoint's name, the recipe's, and ``more``.

    A name that is longer than a file's name should be ends in a digest of the whole.
    """
    parts = [checkpoint_name.rsplit("/", 1)[-1], Path(recipe_name).stem, *more]
    name = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9].rstrip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def compile_packages() -> Iterator[None]:
    """Around the imports of what ``qie[compile]`` installs.

    Raises:
        BackendMissingError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as problem:
        if str(problem.name).partition(".")[0] == "qie":
            raise
        raise BackendMissingError(
            f"{problem.name} is not installed, and compiling needs it; run `pip install 'qie[compile]'`"
        ) from problem
