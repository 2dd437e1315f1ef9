"""What keeps a plan from being built on this machine, found before anything heavy starts."""

import shutil
import tomllib
from contextlib import suppress
from pathlib import Path

from qie.compiler.backends import BUILDERS
from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.tokenizer import check_tokenizer
from qie.compiler.planning.plan import Plan
from qie.engines.bundle.bundle import Bundle, foreign_files, is_bundle, open_bundle
from qie.engines.bundle.manifest import Component
from qie.engines.errors import BackendMissingError, BuildError, BundleError, CalibrationError
from qie.engines.files import existing, is_leftover
from qie.engines.new_folders import resumed_bytes

__all__ = ["check_buildable", "check_calibrated", "check_download", "missing_builder", "other_bundle"]


def check_buildable(plan: Plan, *, more_bytes: int = 0) -> None:
    """Reject a plan that cannot be built here; no weights are read.

    Args:
        plan: of the build.
        more_bytes: that the build needs on the disk of the destination for a while.

    Raises:
        BackendMissingError: no builder of this qie serves the recipe, or it is not installed.
        CheckpointError: the configs of the checkpoint do not belong together.
        BuildError: the destination holds something else than a bundle, or its disk is too small.
    """
    for planned in plan.components:
        reason = missing_builder(plan, planned.component)
        if reason is not None:
            raise BackendMissingError(
                f"{reason}; build on a machine that meets this, or use the recipe cpu", option="gpu"
            )
    check_tokenizer(plan.checkpoint)
    path = plan.destination
    if path.exists() and not is_bundle(path) and not (path.is_dir() and not any(path.iterdir())):
        raise BuildError(f"{path} exists and is not a qie bundle; choose another folder or delete it", option="out")
    foreign = foreign_files(path) if path.exists() else ()
    if foreign:
        raise BuildError(f"{path} also holds {foreign[0]}, which a build would delete; move it away", option="out")
    if is_leftover(path) or not _is_utf8(path):
        raise BuildError(
            f"{path} is the name of a temporary folder, or no text in UTF-8; choose another folder", option="out"
        )
    free = shutil.disk_usage(existing(path)).free + resumed_bytes(path)
    needed = plan.disk_bytes + more_bytes
    if needed > free:
        raise BuildError(
            f"building the bundle needs {needed:,} bytes, {existing(path)} has {free:,} free; "
            "free some space or choose a folder on another disk",
            option="out",
        )


def check_calibrated(plan: Plan) -> None:
    """Reject a plan whose scales would be placeholders.

    Raises:
        CalibrationError: a component is quantized, and there is no calibration.
    """
    for planned in plan.components:
        section = plan.recipe.components[planned.component]
        schemes = [scheme for scheme in (section.scheme, section.attention) if scheme != "none"]
        if schemes and plan.calibration is None:
            raise CalibrationError(
                f'the recipe {plan.recipe_name} quantizes {planned.component} ("{schemes[0]}"), which needs a '
                "calibration of this model; make one with `qie calibrate`",
                option="calibration",
            )


def _is_utf8(path: Path) -> bool:
    """Whether onnxruntime can open files in ``path``."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def other_bundle(plan: Plan) -> Bundle | None:
    """The bundle that ``plan`` would replace and that is not an earlier build of the same; None where there is none.

    The same are a model of equal name and revision, LoRAs of equal content and weights, and a recipe of equal name with
    the same backend for the language model; a bundle that does not open is not counted.

    Raises:
        CheckpointError: a LoRA was changed since it was opened.
    """
    if not is_bundle(plan.destination):
        return None
    try:
        old = open_bundle(plan.destination.absolute())
    except BundleError:
        return None
    model = old.manifest.model
    recipe, weights = old.manifest.recipe, [lora.weight for lora in plan.loras]
    made = (model.name, model.revision, recipe.name, _language_backend(recipe.toml))
    backend = plan.recipe.components.language.backend
    planned = (plan.checkpoint.name, plan.checkpoint.revision, plan.recipe_name, backend)
    if made != planned or weights != [lora.weight for lora in old.manifest.loras]:
        return old
    same = all(lora.digest() == o.sha256 for lora, o in zip(plan.loras, old.manifest.loras, strict=True))
    return None if same else old


def _language_backend(toml: str) -> object:
    """The backend that a recipe in TOML names for the language model; None where it names none."""
    with suppress(ValueError, AttributeError):  # no recipe of this version
        return tomllib.loads(toml).get("components", {}).get("language", {}).get("backend")
    return None


def check_download(checkpoint: Checkpoint, *, destination: Path, output_bytes: int) -> None:
    """Reject a download of weights that does not fit on its disk, together with an output on the same disk.

    Nothing is checked where the hub does not tell the size of the weights.

    Raises:
        BuildError: the disk of the hub's cache is too small.
    """
    missing = checkpoint.missing_bytes()
    if not missing:
        return
    cache, target = existing(checkpoint.path), existing(destination)
    needed = missing + (output_bytes if cache.stat().st_dev == target.stat().st_dev else 0)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise BuildError(
            f"{checkpoint.name} has {missing:,} bytes of weights to download, {needed:,} bytes are needed on the disk "
            f"of {cache}, and {free:,} are free there; free some space or set HF_HOME to a folder on another disk"
        )


def missing_builder(plan: Plan, component: Component) -> str | None:
    """Why this machine can build ``component`` for none of the recipe's backends; None where it can for one."""
    planned = next(p for p in plan.components if p.component == component)
    if planned.backend is not None or planned.finish is not None:
        return None
    backends = plan.recipe.backends_of(component)
    reasons = [BUILDERS[backend].unavailable(plan.recipe, plan.device) for backend in backends if backend in BUILDERS]
    why = ", and ".join(reason.replace("; ", ", ") for reason in reasons if reason is not None)
    why = why or f"this qie builds for {', '.join(BUILDERS)}"
    return f"the recipe {plan.recipe_name} builds {component} for {' or '.join(backends)}: {why}"
