"""The starting noise of an edit: the numbers that torch's CPU generator gives for a seed, without torch.

``torch.randn`` on a CPU is three steps, and each is reproduced here:

1. The generator is mt19937, seeded with the low 32 bits of the seed (ATen/core/MT19937RNGEngine.h). numpy's RandomState
   holds the same generator and seeding, and its stream is frozen.
2. From 16 values on, blocks of 16 uniforms become 16 normals by Box-Muller; fewer than 16 values are computed one
   pair at a time in float64 (ATen/native/cpu/DistributionTemplates.h, ATen/core/DistributionsHelper.h).
3. The blocks' logarithm, sine and cosine are the single-precision polynomials of Moshier's Cephes library (logf.c,
   sinf.c), evaluated with fused multiply-adds, as the AVX2 kernel of torch's x86-64 builds for Linux does.

Every operation of the blocks is exact or rounded as IEEE 754 says, so their noise is the same on every machine. It is
bit for bit that of torch 2.13 on an x86-64 CPU with AVX2 or AVX-512. Where torch has no AVX2 it uses the C library's
functions: its float32 values then lie within 5e-6 of these, and one bfloat16 value in about 9,000 is another (measured
on x86-64 with torch's AVX2 switched off: at most 2.7e-6 in 2e8 values).

bfloat16 is float32 rounded at the end, as in torch 2.13. Earlier releases (2.7 among them; pytorch issue 166853) drew
8-bit uniforms and rounded each step to bfloat16: their bfloat16 noise is another.

Shape suffixes: S values of the tensor, flat; D draws of the generator; K blocks of 16, each [2, 8]: 8 radii, 8 angles.
"""

import math
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from qie.engines.bfloat16 import round_to_bfloat16
from qie.engines.errors import RequestError

__all__ = ["TORCH_SEED_RANGE", "standard_normal"]

TORCH_SEED_RANGE: Final = range(-(2**63), 2**64)
"""The seeds that ``torch.Generator.manual_seed`` takes. Those with equal low 32 bits give equal noise on a CPU."""

Float32 = NDArray[np.float32]

_BLOCK: Final = 16

# Cephes logf.c: ln(1 + x) = x - x^2 / 2 + x^3 P(x), and ln 2 as a sum of a short and a small number.
_LOG: Final = np.array(
    [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ],
    np.float32,
)
_LN2_HIGH: Final = np.float32(0.693359375)
_LN2_LOW: Final = np.float32(-2.12194440e-4)
_SQRT_HALF: Final = np.float32(0.707106781186547524)

# Cephes sinf.c: sin x = x + x^3 S(x^2) and cos x = 1 - x^2 / 2 + x^4 C(x^2) up to pi / 4; pi / 4 as a sum of three.
_SIN: Final = np.array([-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1], np.float32)
_COS: Final = np.array([2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2], np.float32)
_QUARTER_PI: Final = np.array([0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8], np.float32)


def standard_normal(shape: tuple[int, ...], *, seed: int, dtype: Literal["float32", "bfloat16"]) -> Float32:
    """The values of ``torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)`` on a CPU.

    A batch is several calls: diffusers' ``randn_tensor`` (utils/torch_utils.py) with a list of generators draws each
    sample with its own generator and a leading 1 in the shape, then concatenates. One call with a leading B is what it
    does with a single generator.

    Args:
        shape: of the result; any rank, () and sizes of 0 included.
        seed: one of ``TORCH_SEED_RANGE``; as in torch no bool, no float.
        dtype: the torch dtype to reproduce. "bfloat16" returns its values widened to float32, which is exact.

    Returns:
        float32 of mean 0 and variance 1; the module's docstring says how closely it equals torch's.

    Raises:
        RequestError: torch refuses the seed too.
    """
    if type(seed) is not int or seed not in TORCH_SEED_RANGE:
        raise RequestError(
            f"the seed is {seed!r}, expected a whole number from -2**63 to 2**64 - 1; use another seed", option="seeds"
        )
    size = math.prod(shape)
    if size < _BLOCK:
        values_S = _normal_pairs(_draw(seed, 4 * _BLOCK), size)
    else:
        # A size that is not a multiple of 16 ends with 16 values drawn again. By then torch has drawn one number for
        # every value in float32, and one for every value of a whole block in bfloat16.
        whole = size - size % _BLOCK
        drawn = size if dtype == "float32" else whole
        draws_D = _draw(seed, drawn + _BLOCK)
        normal_D = _normal_blocks(np.concatenate([draws_D[:whole], draws_D[drawn:]]))
        values_S = normal_D[:size].copy()
        if whole < size:
            values_S[-_BLOCK:] = normal_D[whole:]
    return (values_S if dtype == "float32" else round_to_bfloat16(values_S)).reshape(shape)


def _draw(seed: int, count: int) -> NDArray[np.uint32]:
    """The generator's first ``count`` 32-bit numbers."""
    return np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=count, dtype=np.uint32)


def _normal_pairs(draws_D: NDArray[np.uint32], size: int) -> Float32:
    """Up to 16 normals: pairs by Box-Muller in float64, from 53-bit uniforms of two draws each, the high half first."""
    high, low = draws_D.astype(np.uint64).reshape(-1, 2).T
    uniform = (((high << 32) | low) & (2**53 - 1)) * 2.0**-53
    values: list[float] = []
    for turn, depth in uniform[:_BLOCK].reshape(-1, 2).tolist():
        radius = math.sqrt(-2.0 * math.log1p(-depth))
        values += [radius * math.cos(2.0 * math.pi * turn), radius * math.sin(2.0 * math.pi * turn)]
    return np.array(values[:size], np.float32)


def _normal_blocks(draws_D: NDArray[np.uint32]) -> Float32:
    """One normal for each draw, D a multiple of 16: Box-Muller in float32, from uniforms of 24 bits."""
    uniform_K28 = ((draws_D & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)).reshape(-1, 2, 8)
    radius_K8 = np.sqrt(np.float32(-2) * _log(np.float32(1) - uniform_K28[:, 0]))
    sine_K8, cosine_K8 = _sine_and_cosine(np.float32(2 * np.pi) * uniform_K28[:, 1])
    normal_K28 = np.stack([radius_K8 * cosine_K8, radius_K8 * sine_K8], axis=1)
    return normal_K28.reshape(-1) + np.float32(0)  # the mean, which makes -0 a 0


def _log(x: Float32) -> Float32:
    """The natural logarithm of normal numbers > 0."""
    mantissa, power = np.frexp(x)
    small = mantissa < _SQRT_HALF
    exponent = (power - small).astype(np.float32)
    t = np.where(small, mantissa + mantissa, mantissa) - np.float32(1)
    t2 = t * t
    tail = _fma(_polynomial(_LOG, t) * t, t2, exponent * _LN2_LOW)
    return _fma(exponent, _LN2_HIGH, t + _fma(t2, np.float32(-0.5), tail))


def _sine_and_cosine(x: Float32) -> tuple[Float32, Float32]:
    """Sine and cosine of angles of 0 to 2 pi, in radians."""
    octant = ((x * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    t = x
    for part in _QUARTER_PI:
        t = _fma(octant.astype(np.float32), -part, t)
    t2 = t * t
    sine = _fma(_polynomial(_SIN, t2) * t2, t, t)
    cosine = _fma(_polynomial(_COS, t2) * t2, t2, np.float32(-0.5) * t2) + np.float32(1)
    swapped = (octant & 2) != 0
    sine, cosine = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(octant & 4, -sine, sine), np.where((octant + 2) & 4, -cosine, cosine)


def _polynomial(coefficients: Float32, x: Float32) -> Float32:
    """Horner's rule, the highest power first."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, coefficient)
    return value


def _fma(a: Float32, b: Float32 | np.float32, c: Float32 | np.float32) -> Float32:
    """A * b + c rounded to float32: a float64 holds the product exactly, and the sum with 29 bits to spare."""
    return (a.astype(np.float64) * b + c).astype(np.float32)
