"""Builders: graph to engine, one file a backend; the two TensorRTs share theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from qie.compiler.backends import onnxruntime
from qie.compiler.backends.tensorrt.builder import TensorRT
from qie.compiler.recipe.schema import Recipe
from qie.engines.bundle.manifest import EngineRecord, GraphRecord

__all__ = ["BUILDERS", "Builder"]


class Builder(Protocol):
    """What builds the engines of a backend; a module or an object."""

    def version(self) -> str:
        """Version of the installed backend."""
        ...

    def unavailable(self, recipe: Recipe) -> str | None:
        """Why this machine cannot build for the recipe's GPU, and what to do about it; None where it can."""
        ...

    def build(
        self,
        graph: GraphRecord,
        folder: Path,
        *,
        key: str,
        recipe: Recipe,
        progress: Callable[[int, int], None] = ...,
    ) -> EngineRecord:
        """Make an engine of ``graph``, whose files lie in ``folder``, in the same folder.

        Raises:
            RecipeError, BuildError: the graph cannot become an engine for the recipe's GPU, or not on this machine.
        """
        ...


BUILDERS: dict[str, Builder] = {
    "onnxruntime": onnxruntime,
    "tensorrt-rtx": TensorRT("tensorrt-rtx"),
    "tensorrt": TensorRT("tensorrt"),
}
"""Backend to its builder. Facts such as the module that builds are in ``qie.engines.backends``."""
