"""The noise against torch, and against values of torch 2.13 (CPU with AVX-512) written down here."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest

from qie.engines.errors import RequestError
from qie.engines.inputs.noise import TORCH_SEED_RANGE, standard_normal

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, -1, -2, -(2**63))
SHAPES = (
    (),
    (0,),
    (0, 3),
    *((size,) for size in range(1, 50)),
    (100,),
    (3, 7, 11),
    (1, 16, 17, 19),
    (1, 1, 16, 32, 48),
)
REFUSED: tuple[Any, ...] = (2**64, -(2**63) - 1, 1.0, True, "1", None, math.nan)


@pytest.fixture
def torch() -> ModuleType:
    """torch, of a release that draws bfloat16 as 2.13 does."""
    module: ModuleType = pytest.importorskip("torch", minversion="2.13")
    return module


@pytest.fixture
def torch_avx2(torch: ModuleType) -> ModuleType:
    """torch on a CPU where it computes as engines/inputs/noise.py does."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in {"AVX2", "AVX512"}:
        pytest.skip(f"torch uses the C library's functions on this CPU ({capability})")
    return torch


def torch_normal(torch: ModuleType, shape: tuple[int, ...], seed: int, dtype: Dtype) -> Any:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=getattr(torch, dtype)).float().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch_bit_for_bit(torch_avx2: ModuleType, seed: int, dtype: Dtype) -> None:
    for shape in SHAPES:
        noise = standard_normal(shape, seed=seed, dtype=dtype)
        expected = torch_normal(torch_avx2, shape, seed, dtype)
        assert noise.dtype == np.float32
        assert noise.shape == shape
        assert noise.tobytes() == expected.tobytes(), f"{shape}: {noise} is not {expected}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_bit_for_bit_over_many_values(torch_avx2: ModuleType, dtype: Dtype) -> None:
    shape = (1, 16, 128, 128, 4)
    for seed in range(100, 116):
        noise = standard_normal(shape, seed=seed, dtype=dtype)
        assert noise.tobytes() == torch_normal(torch_avx2, shape, seed, dtype).tobytes(), f"seed {seed}"


def test_is_close_to_torch_without_avx2(torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "noise.npy"
    program = (
        "import sys, numpy, torch; assert torch.backends.cpu.get_cpu_capability() not in {'AVX2', 'AVX512'};"
        "numpy.save(sys.argv[1], torch.randn(2**20, generator=torch.Generator('cpu').manual_seed(42)).numpy())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=True)
    np.testing.assert_allclose(standard_normal((2**20,), seed=42, dtype="float32"), np.load(path), rtol=0, atol=5e-6)


# float32 and bfloat16 values in the shortest digits that name them.
FEW = (1.5409961, -0.2934289, -2.1787894, 0.56843126, -1.0845224)
FEW_BFLOAT16 = (1.5390625, -0.29296875, -2.171875, 0.5703125, -1.0859375)
BLOCK = (
    *(-1.1258398, -1.1523602, -0.25057858, -0.4338788, 0.84871036, 0.69200915, -0.31601277, -2.1152194),
    *(0.32227492, -1.2633348, 0.3499832, 0.30813393, 0.11984151, 1.2376579, 1.1167772, -0.24727815),
)
BLOCK_BFLOAT16 = (
    *(-1.125, -1.15625, -0.25, -0.43359375, 0.84765625, 0.69140625, -0.31640625, -2.109375),
    *(0.32226562, -1.265625, 0.34960938, 0.30859375, 0.119628906, 1.234375, 1.1171875, -0.24707031),
)
TAIL = (
    *(1.9269153, -0.15959747, -0.49739754, 0.43958926, -0.75813115, 1.0783176, 0.80080056, 1.6806206, 0.3558599),
    *(1.2964228, 0.6104665, 1.3347378, -0.23162432, 0.04175949, -0.2515753, 0.8598585, -0.30972677),
)
TAIL_BFLOAT16 = (
    *(1.9296875, 1.640625, -0.15917969, -0.49804688, 0.43945312, -0.7578125, 1.078125, 0.80078125, 1.6796875),
    *(1.28125, 1.296875, 0.609375, 1.3359375, -0.23144531, 0.041748047, -0.25195312, 0.859375),
)


@pytest.mark.parametrize(
    ("seed", "dtype", "expected"),
    [
        (0, "float32", FEW),
        (0, "bfloat16", FEW_BFLOAT16),
        (0, "float32", BLOCK),
        (0, "bfloat16", BLOCK_BFLOAT16),
        (42, "float32", TAIL),
        (42, "bfloat16", TAIL_BFLOAT16),
        (2**32 - 1, "float32", (1.219763, -0.39297947, 1.0230751)),
        (2**32 - 1, "bfloat16", (1.21875, -0.39257812, 1.0234375)),
    ],
)
def test_equals_values_of_torch(seed: int, dtype: Dtype, expected: tuple[float, ...]) -> None:
    noise = standard_normal((len(expected),), seed=seed, dtype=dtype)
    np.testing.assert_array_equal(noise, np.array(expected, np.float32))


# Seed 12 holds a uniform of 0 in the second shape: a radius of -0, from which torch makes a normal of +0.
@pytest.mark.parametrize(
    ("shape", "seed", "dtype", "digest"),
    [
        ((1, 1, 16, 32, 48), 42, "float32", "aca807638627956ff9d51ebdb953c9f2ef5782b0dc2c1d8bfc7e25ff007f7b10"),
        ((1, 1, 16, 32, 48), 42, "bfloat16", "ae7a1baf4e138bfb9658bbd3af8d3734fc8e0f7d4e52b531a9ce20d1c636503d"),
        ((1, 16, 128, 128, 4), 12, "float32", "27a24a350e1bb83257f11cc38ec03bee210bf6d442c6b4d150f65779d294e03d"),
        ((1, 16, 128, 128, 4), 12, "bfloat16", "5f8689268172080c6591b9c457b2ba0afb8b23b1e30d2950de4c8d3a5539a54c"),
        ((1, 3, 7, 11), 1, "float32", "52febeec603fecdfbfe091f038d694e49c8ac9f2b4d6c70a78ffca24c2a2ca05"),
        ((1, 3, 7, 11), 1, "bfloat16", "7b8cd453aae4c09d183d4fffb9bbfad0ba2472a0d5ee79b3b51b0c36ee11a40b"),
    ],
)
def test_equals_bytes_of_torch(shape: tuple[int, ...], seed: int, dtype: Dtype, digest: str) -> None:
    noise = standard_normal(shape, seed=seed, dtype=dtype)
    assert noise.shape == shape
    assert hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest() == digest


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    noise = {seed: standard_normal((40,), seed=seed, dtype="float32").tobytes() for seed in SEEDS}
    assert noise[0] == noise[2**32] == noise[2**63] == noise[-(2**63)]
    assert noise[1] == noise[2**32 + 1]
    assert noise[-1] == noise[2**32 - 1] == noise[2**64 - 1]
    assert len(set(noise.values())) == 6


@pytest.mark.parametrize("seed", [TORCH_SEED_RANGE[0], TORCH_SEED_RANGE[-1]])
def test_torch_takes_the_ends_of_the_seed_range(torch: ModuleType, seed: int) -> None:
    assert torch.Generator("cpu").manual_seed(seed).initial_seed() == seed % 2**64


@pytest.mark.parametrize("seed", REFUSED)
def test_refuses_a_seed_in_one_sentence(seed: Any) -> None:
    with pytest.raises(RequestError) as error:
        standard_normal((4,), seed=seed, dtype="float32")
    assert str(error.value) == (
        f"the seed is {seed!r}, expected a whole number from -2**63 to 2**64 - 1; use another seed"
    )


@pytest.mark.parametrize("seed", REFUSED)
def test_torch_refuses_the_same_seeds(torch: ModuleType, seed: Any) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        torch.Generator("cpu").manual_seed(seed)


def test_does_not_touch_the_random_state_of_numpy() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    standard_normal((100,), seed=1, dtype="float32")
    assert np.random.random() == expected
