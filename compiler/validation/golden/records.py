"""The description of a golden file, and the names of its tensors."""

from dataclasses import dataclass
from typing import Annotated, Literal

from qie.engines.bundle.manifest import Component, LoraRecord
from qie.engines.records import Range

__all__ = ["CaseRecord", "GoldenRecord", "ModulesRecord", "case_tensor", "module_tensor"]

_Count = Annotated[int, Range(0, 1 << 20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRecord:
    """One edit of the reference.

    Attributes:
        name: unique in the file.
        instruction: of the edit.
        negative: the negative prompt.
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 or less is none.
        width, height: of the result in pixels.
        images: number of input images.
        recorded: the steps whose latents and velocities are in the file, ascending.
        chain: number of edits in a row, each of the result of the one before; 0 for none.
        target: whether the file has the exact answer.
    """

    name: str
    instruction: str
    negative: str
    seed: Annotated[int, Range(0, 1 << 63)]
    steps: Annotated[int, Range(1, 1000)]
    guidance: Annotated[float, Range(-1e6, 1e6)]
    width: Annotated[int, Range(16, 1 << 16)]
    height: Annotated[int, Range(16, 1 << 16)]
    images: Annotated[int, Range(1, 3)]
    recorded: tuple[_Count, ...]
    chain: _Count = 0
    target: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulesRecord:
    """The modules of one component whose outputs were sampled during one run of the first case.

    The samples of a module are the elements of its output, seen as [rows, channels], at ``sample_places`` of its shape
    (modules.py, which defines the rows of each component). A block of the transformer has its image stream under its
    name and its text stream under its name and `` (text)``. Modules that the component's graph lacks are left out.

    Attributes:
        component: the component.
        step: of the schedule, for the transformer; 0 for the others.
        names: of the modules, as the checkpoint names their tensors, in the order in which they ran.
        shapes: [rows, channels] of the output of each.
        blocks: names of those that are a whole block.
    """

    component: Component
    step: _Count
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenRecord:
    """The description of a golden file.

    Attributes:
        schema: version of this layout.
        qie: version that wrote the file.
        model: name of the checkpoint.
        digest: of the checkpoint, as in the manifest of a bundle.
        loras: fused into the weights.
        dtype: in which the reference computed.
        packages: (package, version) of the reference.
        tensors: sha256 of all tensors (``tensors_digest``).
        cases: in the order of the file.
        modules: of each component that was sampled.
    """

    schema: Literal[1]
    qie: str
    model: str
    digest: str
    loras: tuple[LoraRecord, ...]
    dtype: Literal["float32", "bfloat16"]
    packages: tuple[tuple[str, str], ...]
    tensors: str
    cases: tuple[CaseRecord, ...]
    modules: tuple[ModulesRecord, ...]


def case_tensor(number: int, name: str) -> str:
    """The name in the file of the tensor ``name`` of the case ``number``."""
    return f"case.{number}.{name}"


def module_tensor(component: Component, name: str) -> str:
    """The name in the file of the samples of the module ``name``."""
    return f"module.{component}.{name}"
