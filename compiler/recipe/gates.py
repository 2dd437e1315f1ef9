"""The gates of a recipe: bounds that ``qie validate`` checks, each read by one check."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from qie.compiler.recipe.toml import Within

__all__ = ["Gates", "flat"]

Fraction = Annotated[float, Within(low=0, high=1)]
Error = Annotated[float, Within(low=0, high=10)]
Decibel = Annotated[float, Within(low=0, high=200, unit="dB")]
Similarity = Annotated[float, Within(low=-1, high=1)]
Distance = Annotated[float, Within(low=0, high=10)]
Pixels = Annotated[float, Within(low=0, high=1024, unit="pixels")]
Color = Annotated[float, Within(low=0, high=100)]
Factor = Annotated[float, Within(low=0.01, high=100)]


@dataclass(frozen=True, kw_only=True, slots=True)
class StructureGates:
    """Bounds of what an engine's own description says.

    Attributes:
        fused_attention: smallest fraction of attention layers that a kernel computes without a score tensor.
        quantized_kernels: smallest fraction of quantized linears that a kernel computes from quantized values.
    """

    fused_attention: Fraction = 1.0
    quantized_kernels: Fraction = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentGates:
    """Largest relative L2 error of each component, on the reference's inputs.

    Attributes:
        modulation: of the stored modulation tables, against their weights.
        vision: of the image embeddings.
        language: of the prompt embeddings.
        vae_encoder: of the latents.
        transformer: of the velocity, over the recorded steps together.
        vae_decoder: of the pixels, 0 to 255.
    """

    modulation: Error = 0.005
    vision: Error = 0.03
    language: Error = 0.03
    vae_encoder: Error = 0.03
    transformer: Error = 0.03
    vae_decoder: Error = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryGates:
    """Bounds along the reference's trajectory, where every step starts from the reference's latents.

    Attributes:
        velocity: largest relative L2 error of a step's velocity, of either pass.
        latents: largest relative L2 error of a step's change of the latents, which is guidance, its rescale and dsigma.
        block: largest relative L2 error of the output of a block or an operation in a run of the graph.
    """

    velocity: Error = 0.05
    latents: Error = 0.05
    block: Error = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class EditGates:
    """Bounds of whole edits from the reference's noise.

    Attributes:
        psnr: smallest PSNR against the reference's edit.
        ssim: smallest SSIM against it.
        lpips: largest LPIPS against it.
        shift: largest shift against it.
        scale: largest difference of the scale against it from 1.
        delta_e: largest mean CIEDE2000 where the reference leaves the input alone.
        max_drop_db: largest loss of PSNR against a case's exact answer, from the unquantized reference.
        drift: largest mean CIEDE2000 between the last images of five edits in a row and the reference's.
        memory: largest peak memory, as a multiple of what ``qie plan`` says.
    """

    psnr: Decibel = 28.0
    ssim: Similarity = 0.9
    lpips: Distance = 0.1
    shift: Pixels = 0.5
    scale: Error = 0.005
    delta_e: Color = 2.0
    max_drop_db: Decibel = 0.5
    drift: Color = 6.0
    memory: Factor = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Gates:
    """All gates of a recipe; the defaults are those of unquantized engines in bfloat16."""

    structure: StructureGates = field(default_factory=StructureGates)
    components: ComponentGates = field(default_factory=ComponentGates)
    trajectory: TrajectoryGates = field(default_factory=TrajectoryGates)
    edits: EditGates = field(default_factory=EditGates)


def flat(gates: Gates) -> dict[str, float]:
    """The bounds by dotted key, such as ``gates.edits.psnr``."""
    return dict(_flat(gates, "gates"))


def _flat(table: Any, prefix: str) -> Iterator[tuple[str, float]]:
    for item in fields(table):
        value, key = getattr(table, item.name), f"{prefix}.{item.name}"
        if is_dataclass(value):
            yield from _flat(value, key)
        else:
            yield key, value
