"""What engines are made from, as a plan counts it: a graph, a checkpoint of TensorRT-LLM, or a text encoder."""

from collections.abc import Mapping, Sequence

from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.backends.tensorrt_llm.tensors import checkpoint_bytes, whole_groups
from qie.compiler.backends.vllm.checkpoint import text_encoder_bytes
from qie.compiler.backends.vllm.settings import Settings as TextEncoderSettings
from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import graph_dtype
from qie.compiler.graphs.graph import Graph
from qie.compiler.planning.profiles import largest_dims
from qie.compiler.recipe.schema import Recipe
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.backends import Source

__all__ = ["language_io_bytes", "language_settings", "source_bytes", "text_encoder_settings"]


def source_bytes(source: Source, graph: Graph, amax: Mapping[str, float], model: Model, recipe: Recipe) -> int:
    """Size of what an engine of a component is made from.

    Args:
        source: what that is.
        graph: of the component, quantized as the recipe says.
        amax: largest magnitude of the input of each quantized linear, after smoothing.
        model: the model.
        recipe: the recipe.

    Raises:
        ExportError, RecipeError: the format of the source does not express the model or the recipe.
    """
    match source:
        case "graph":
            return total_bytes(graph.weights)
        case "tensorrt-llm":
            return checkpoint_bytes(language_settings(model, recipe, amax))
        case "transformers":
            return text_encoder_bytes(graph.weights, graph.dtype)


def language_settings(model: Model, recipe: Recipe, amax: Mapping[str, float], *, tensor_parallel: int = 1) -> Settings:
    """The checkpoint of TensorRT-LLM that ``recipe`` asks for of the language model.

    A linear that is executed together with one that is not quantized is not quantized either.

    Args:
        model: the model.
        recipe: the recipe.
        amax: largest magnitude of the input of each quantized linear, after smoothing.
        tensor_parallel: GPUs that share every layer.

    Raises:
        ExportError, RecipeError: the format does not express the model or the recipe.
    """
    return Settings(
        config=model.language,
        dtype=graph_dtype(recipe, "language"),
        scheme=recipe.components.language.scheme,
        amax=whole_groups(amax),
        positions=largest_dims("language", recipe, model)["prompt_tokens"],
        tensor_parallel=tensor_parallel,
    )


def text_encoder_settings(model: Model, recipe: Recipe, graphs: Sequence[Graph]) -> TextEncoderSettings:
    """The text encoder that ``recipe`` asks for, for vLLM.

    Args:
        model: the model.
        recipe: the recipe.
        graphs: of the components that vLLM runs.

    Raises:
        RecipeError: the format does not express the recipe's precision.
    """
    return TextEncoderSettings(
        model=model,
        dtype=graph_dtype(recipe, "language"),
        positions=largest_dims("language", recipe, model)["prompt_tokens"],
        components=tuple(graph.component for graph in graphs),
        weights=[weight for graph in graphs for weight in graph.weights],
    )


def language_io_bytes(config: LanguageConfig, sizes: Mapping[str, int]) -> int:
    """GPU memory of inputs and outputs of TensorRT-LLM's engine: prompt table, rotary table, hidden states, ids.

    The rotary table has a row for every token of the longest prompt, whatever the prompt (``engine_inputs`` of the
    session has all inputs).
    """
    tokens, images = sizes["prompt_tokens"], sizes["image_tokens"]
    rotary, hidden, ids = 4 * tokens * config.head_dim, 4 * tokens * config.width, 3 * 4 * tokens
    return 2 * images * config.width + rotary + hidden + ids
