"""Builders of engines, one per backend; TensorRT and TensorRT for RTX share theirs."""

from pathlib import Path
from typing import Protocol

from qie.compiler.backends import onnxruntime
from qie.compiler.backends.tensorrt.builder import TensorRT
from qie.compiler.backends.tensorrt_llm import builder as tensorrt_llm_builder
from qie.compiler.backends.vllm import builder as vllm_builder
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.progress import StageProgress

__all__ = ["BUILDERS", "Builder"]


class Builder(Protocol):
    """The interface of a backend's builder: a module or an object."""

    def version(self) -> str:
        """The version of the installed backend."""
        ...

    def unavailable(self, recipe: Recipe, device: int | None = None) -> str | None:
        """Why this machine cannot build for the recipe's GPU, a semicolon, and the fix; None where it can.

        Args:
            recipe: the recipe.
            device: CUDA index of the GPU to build on, where building takes one; None for the first that fits.
        """
        ...

    def build(
        self,
        graph: GraphRecord,
        folder: Path,
        *,
        key: str,
        recipe: Recipe,
        device: int | None = None,
        progress: StageProgress = ...,
    ) -> EngineRecord:
        """Build an engine of ``graph`` into the folder of the graph.

        Args:
            graph: the graph.
            folder: the folder of the graph's files.
            key: the engine's cache key.
            recipe: the recipe.
            device: see ``unavailable``.
            progress: called with (units done, units in all).

        Raises:
            RecipeError: the recipe's GPU lacks a data type of the graph.
            BuildError: the backend rejects the graph or fails, or memory or disk space ran out.
        """
        ...


BUILDERS: dict[str, Builder] = {
    "onnxruntime": onnxruntime,
    "tensorrt-rtx": TensorRT("tensorrt-rtx"),
    "tensorrt": TensorRT("tensorrt"),
    "tensorrt-llm": tensorrt_llm_builder,
    "vllm": vllm_builder,
}
"""Backend -> its builder. ``qie.engines.backends`` has the facts of a backend, such as the module that builds."""
