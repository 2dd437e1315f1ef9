"""Whether this machine has the GPU that an engine is for, for backends that build only there."""

from qie.compiler.recipe.schema import Recipe
from qie.engines.machine import gpu_misfit, this_machine

__all__ = ["no_local_gpu"]


def no_local_gpu(backend: str, recipe: Recipe, device: int | None = None) -> str | None:
    """Why ``backend`` cannot build for the recipe's GPU here, a semicolon, and the fix; None where it can.

    Args:
        backend: name of the backend.
        recipe: the recipe.
        device: CUDA index of the GPU to build on; None for the first that fits.
    """
    machine = this_machine()
    misfit = gpu_misfit(machine, str(recipe.compute_capability), device)
    if misfit is None:
        return None
    found, _, fix = misfit.partition("; ")
    if machine.gpus and device is None:
        fix = "build on a machine with such a GPU"
    return (
        f"{backend} builds only for a local GPU, the recipe is for compute capability {recipe.compute_capability}, and "
        f"{found}; {fix}"
    )
