"""The graph of every component."""

from collections.abc import Callable

from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.graph import Graph
from qie.compiler.graphs.language import language
from qie.compiler.graphs.transformer import transformer
from qie.compiler.graphs.vae import vae_decoder, vae_encoder
from qie.compiler.graphs.vision import vision
from qie.compiler.recipe.schema import Recipe
from qie.compiler.weights.weight import DType
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.errors import RecipeError

__all__ = ["GRAPHS", "graph_dtype", "write_graph_of"]

GRAPHS: dict[Component, Callable[[Model, DType], Graph]] = {
    "vision": lambda model, dtype: vision(model.vision, dtype=dtype),
    "language": lambda model, dtype: language(model.language, dtype=dtype),
    "vae_encoder": lambda model, dtype: vae_encoder(model.vae, dtype=dtype),
    "transformer": lambda model, dtype: transformer(model.transformer, dtype=dtype),
    "vae_decoder": lambda model, dtype: vae_decoder(model.vae, dtype=dtype),
}
assert tuple(GRAPHS) == COMPONENTS


def graph_dtype(recipe: Recipe, component: Component) -> DType:
    """The dtype in which ``component`` computes under ``recipe``.

    Raises:
        RecipeError: the graphs do not support the recipe's precision.
    """
    precision = recipe.components[component].precision
    if precision == "float16":
        raise RecipeError(
            f'components.{component}.precision is "float16", which the graphs do not support; set it to "bfloat16" or '
            '"float32"'
        )
    return precision


def write_graph_of(component: Component, model: Model, recipe: Recipe) -> Graph:
    """The graph of ``component`` in the recipe's precision; reads no weight.

    Raises:
        RecipeError: see ``graph_dtype``.
    """
    return GRAPHS[component](model, graph_dtype(recipe, component))
