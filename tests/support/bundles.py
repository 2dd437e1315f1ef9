"""Plans and bundles of the tests' checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.lora import Lora
from qie.compiler.packing.pack import Progress, build_bundle
from qie.compiler.planning.plan import Plan, make_plan
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.bundle import Bundle

__all__ = ["build", "planned"]


def planned(
    checkpoint: Path | str,
    destination: Path,
    gpu: str | Recipe = "cpu",
    *,
    loras: Sequence[Lora] = (),
    calibration: Calibration | None = None,
    weights: bool = True,
) -> Plan:
    """Plan the bundle of ``checkpoint`` in the folder ``destination``.

    Args:
        checkpoint: A folder, or ``"pocket"``.
        destination: Of the bundle.
        gpu: The recipe: a name, a path, the text of a TOML file (which is written as ``mine.toml`` beside
            ``destination``), or a recipe itself.
        loras: Fused into the weights, in this order.
        calibration: What a recipe that quantizes needs to be built.
        weights: False for a checkpoint of configs alone.
    """
    name = gpu if isinstance(gpu, str) else "own"
    if "\n" in name:
        destination.parent.mkdir(parents=True, exist_ok=True)
        path = destination.with_name("mine.toml")
        path.write_text(name)
        name = str(path)
    return make_plan(
        open_checkpoint(str(checkpoint), weights=weights),
        recipe_name=name,
        recipe=load_recipe(name) if isinstance(gpu, str) else gpu,
        loras=loras,
        destination=destination,
        calibration=calibration,
    )


def build(
    checkpoint: Path | str,
    destination: Path,
    gpu: str | Recipe = "cpu",
    *,
    loras: Sequence[Lora] = (),
    calibration: Calibration | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Bundle:
    """Build what ``planned`` plans."""
    return build_bundle(planned(checkpoint, destination, gpu, loras=loras, calibration=calibration), progress=progress)
