"""What a bundle was made from, as far as its manifest says: its recipe, and its LoRAs from their files."""

from collections.abc import Sequence
from pathlib import Path

from qie.compiler.checkpoint.lora import Lora, open_lora, parse_lora
from qie.compiler.planning.resolve import LoraSource
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import MANIFEST
from qie.engines.errors import BundleError, CheckpointError, RecipeError

__all__ = ["bundle_loras", "bundle_recipe"]


def bundle_recipe(bundle: Bundle) -> Recipe:
    """The recipe by which ``bundle`` was built.

    Raises:
        BundleError: this version does not read it.
    """
    try:
        return parse_recipe(bundle.manifest.recipe.toml, bundle.path / MANIFEST)
    except RecipeError as error:
        problem, _, _ = str(error).partition(";")
        raise BundleError(
            f"the recipe of {bundle.path} cannot be read ({problem}); build the bundle again with `qie build`"
        ) from error


def bundle_loras(bundle: Bundle, sources: Sequence[LoraSource]) -> list[Lora]:
    """The LoRAs ``sources``, which are those of ``bundle``, opened.

    Raises:
        CheckpointError: they are others, or one cannot be read.
    """
    recorded = bundle.manifest.loras
    weighted = [source if isinstance(source, tuple) else parse_lora(str(source)) for source in sources]
    opened = [open_lora(Path(path), weight) for path, weight in weighted]
    if [(lora.digest(), lora.weight) for lora in opened] != [(lora.sha256, lora.weight) for lora in recorded]:
        names = ", ".join(f"{lora.name}:{lora.weight:g}" for lora in recorded) or "none"
        raise CheckpointError(
            f"the LoRAs are not those of {bundle.name}, which has {names}; name these, in this order", option="loras"
        )
    return opened
