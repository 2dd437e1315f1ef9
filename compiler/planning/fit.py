"""Whether a build fits into the memory of its machine and its GPU, and the sentence that refuses it."""

from qie.compiler.graphs.parts import block_bytes
from qie.compiler.planning.calibration_memory import memory_refusal
from qie.compiler.planning.estimate import ComponentEstimate, Estimate, estimate
from qie.compiler.planning.parts import HOST_BASE, build_bytes
from qie.compiler.planning.plan import Plan
from qie.compiler.recipe.schema import DIVISIBLE
from qie.engines.backends import BACKENDS
from qie.engines.errors import BuildError, RecipeError
from qie.engines.machine import GIB

__all__ = ["check_fit", "refusal"]


def check_fit(plan: Plan) -> None:
    """Reject a build that does not fit, with the numbers.

    Raises:
        RecipeError, BuildError: see ``refusal``.
    """
    refused = refusal(estimate(plan))
    if refused is not None:
        raise refused


def refusal(estimated: Estimate) -> RecipeError | BuildError | None:
    """Why a build does not fit, with the numbers; None where it does.

    The error is a RecipeError where the engines need too much GPU memory, a BuildError where the build needs too much
    host memory.
    """
    recipe = estimated.plan.recipe
    if estimated.gpu_bytes > recipe.memory_gib * GIB:
        return RecipeError(_gpu_refusal(estimated), option="gpu")
    for component in estimated.components:
        if component.host_bytes > estimated.plan.memory:
            return BuildError(_host_refusal(estimated.plan, component), option="memory_gib")
    calibration = estimated.calibration
    return None if calibration is None else memory_refusal(calibration.memory, estimated.plan.memory)


def _host_refusal(plan: Plan, component: ComponentEstimate) -> str:
    planned = next(p for p in plan.components if p.component == component.component)
    asked = plan.recipe.components[component.component].parts
    fix = "build on a machine with more memory"
    parts = ""
    if component.parts > 1 or asked is not None:
        parts = f" in {component.parts} part{'s' if component.parts > 1 else ''}, as the recipe says"
        fix = f"leave components.{component.component}.parts out, or {fix}"
    elif component.component in DIVISIBLE and BACKENDS[component.backend].source == "graph":
        largest = max(block_bytes(planned.graph))
        smallest, factor = (
            build_bytes(component.backend, planned.graph, largest),
            BACKENDS[component.backend].host_factor,
        )
        if factor is not None:
            terms = f"{_gib(HOST_BASE)} + {factor:g} x {_gib(largest)}"
            parts = f", and {_gib(smallest)} in parts of one block each ({terms})"
    return (
        f"building {component.component} takes about {_gib(component.host_bytes)} of host memory{parts}, for weights "
        f"of {_gib(component.weights_bytes)}, and the build may use {_gib(plan.memory)}; {fix}"
    )


def _gpu_refusal(estimated: Estimate) -> str:
    recipe = estimated.plan.recipe
    if recipe.residency == "resident":
        sharing = [c for c in estimated.components if not c.keeps_activations]
        worst = max(sharing, key=lambda c: c.working_bytes)
        terms = [("all weights", sum(c.weights_bytes for c in estimated.components))]
        fix = 'set residency = "sequential" in the recipe'
    else:
        worst = max(estimated.components, key=lambda c: c.weights_bytes + c.working_bytes)
        terms = [(f"weights of {worst.component}", worst.weights_bytes)]
        fix = "choose a GPU with more memory"
    if terms[0][1] < recipe.memory_gib * GIB:
        workspace = "limits.build_workspace_gib, " if worst.workspace_bytes else ""
        fix += f", or lower {workspace}shapes.batch.max or shapes.references.max in the recipe"
    terms += [
        (f"activations of {worst.component}", worst.largest_activation_bytes),
        ("its inputs and outputs", worst.largest_io_bytes),
        ("workspace", worst.workspace_bytes),
    ]
    if recipe.residency == "resident":
        terms.append(("activations that engines keep", estimated.kept_bytes))
    if recipe.compute_capability is None:
        terms.append(("the rest of the process", estimated.gpu_bytes - sum(count for _, count in terms)))
    total = " + ".join(f"{name} {_gib(count)}" for name, count in terms if count >= 0.05 * GIB)
    return (
        f"{estimated.plan.checkpoint.name} does not fit in the memory of the {recipe.gpu}: {total} = "
        f"{_gib(estimated.gpu_bytes)}, and the recipe's memory_gib is {recipe.memory_gib:g}; {fix}"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"
