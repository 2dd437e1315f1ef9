"""Peak rates of the recipes' GPUs: the roofline of an estimate.

Dense rates with float32 accumulation, in TFLOP/s (INT8: TOP/s); float32 is TF32, which the engine compilers use for it.
Memory bandwidth is in GB/s. Both are from the datasheets, at boost clocks that a GPU rarely sustains:

- L40S, L4: NVIDIA L40S and L4 datasheets, half of the figures given with sparsity.
- RTX 4090: NVIDIA Ada GPU Architecture, appendix A. RTX 5090: NVIDIA RTX Blackwell GPU Architecture, appendix A.
- A100: NVIDIA A100 datasheet, SXM. H100: NVIDIA H100 datasheet, SXM, half of the figures given with sparsity.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GPUS", "Peaks"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """Peak rates of one GPU.

    Attributes:
        tflops: by dtype of the operands, named as in numpy; a dtype without tensor cores is absent.
        bandwidth_gb_s: of the GPU's memory.
    """

    tflops: Mapping[str, float]
    bandwidth_gb_s: float


def _peaks(*, bandwidth: float, tf32: float, bf16: float, int8: float, fp8: float | None = None) -> Peaks:
    tflops = {"float32": tf32, "bfloat16": bf16, "int8": int8}
    return Peaks(tflops=tflops | ({"float8_e4m3fn": fp8} if fp8 else {}), bandwidth_gb_s=bandwidth)


GPUS: Mapping[str, Peaks] = {
    "L40S": _peaks(bandwidth=864, tf32=183, bf16=362, fp8=733, int8=733),
    "L4": _peaks(bandwidth=300, tf32=60, bf16=121, fp8=242, int8=242),
    "RTX 4090": _peaks(bandwidth=1008, tf32=82.6, bf16=165, fp8=330, int8=661),
    "RTX 5090": _peaks(bandwidth=1792, tf32=105, bf16=210, fp8=419, int8=838),
    "A100 80GB": _peaks(bandwidth=2039, tf32=156, bf16=312, int8=624),
    "A100 40GB": _peaks(bandwidth=1555, tf32=156, bf16=312, int8=624),
    "H100 80GB": _peaks(bandwidth=3350, tf32=495, bf16=989, fp8=1979, int8=1979),
}
"""By the ``gpu`` of a recipe; a CPU recipe is for any CPU, so it has no peak rates."""
