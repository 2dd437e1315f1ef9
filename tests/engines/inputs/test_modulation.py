"""Modulation tables: equal to an independent evaluation."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qie.engines.bfloat16 import narrow, round_to_bfloat16, widen
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import FileRecord, ModulationRecord, ModulationTensor
from qie.engines.bundle.specs import SchedulerSpec
from qie.engines.errors import BundleError
from qie.engines.inputs.modulation import BundleModulation, compute_tables, split_tables
from qie.engines.inputs.modulation import silu as silu_of
from qie.engines.inputs.modulation import timesteps as timesteps_of
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.stored_schedules import table_name

LAYERS, WIDTH, CHANNELS = 3, 8, 256
SIGMAS = sigmas(SchedulerSpec(use_dynamic_shifting=True, shift_terminal=0.02), steps=5, noise_tokens=64)

Float64 = NDArray[np.float64]


def shapes() -> dict[str, tuple[int, ...]]:
    linears = {
        "time_text_embed.timestep_embedder.linear_1": (WIDTH, CHANNELS),
        "time_text_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
        "norm_out.linear": (2 * WIDTH, WIDTH),
    }
    for layer in range(LAYERS):
        for stream in ("img_mod", "txt_mod"):
            linears[f"transformer_blocks.{layer}.{stream}.1"] = (6 * WIDTH, WIDTH)
    return {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in linears.items()
        for kind in ("weight", "bias")
    }


Case = tuple[Path, ModulationRecord, dict[str, Float64]]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Case]:
    """A folder with random modulation weights, its record, and the same weights in float64."""

    def make(*, dtype: Any = "float32", tables: Any = "float32", zero_cond_t: bool = True) -> Case:
        rng = np.random.default_rng(0)
        stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        content, tensors, weights = b"", [], {}
        for name, shape in shapes().items():
            content += bytes(-len(content) % 64)
            values = rng.normal(0, 0.5, shape).astype(stored)
            tensors.append(ModulationTensor(name=name, dtype=dtype, shape=shape, offset=len(content)))
            weights[name] = values.astype(np.float64)
            content += values.tobytes()
        (tmp_path / "modulation.weights").write_bytes(content)
        record = ModulationRecord(
            file=FileRecord(path="modulation.weights", bytes=len(content), sha256="0" * 64),
            tables=tables,
            tensors=tuple(tensors),
            layers=LAYERS,
            width=WIDTH,
            zero_cond_t=zero_cond_t,
        )
        return tmp_path, record, weights

    return make


def silu(x: Float64) -> Float64:
    return x / (1 + np.exp(-x))


def conditioning(weights: dict[str, Float64], timestep: float) -> Float64:
    """silu(MLP(sinusoids of 1000 t)): cosines first, wavelengths from 2 pi to 20000 pi, exclusive."""
    frequencies = 10000.0 ** (-np.arange(CHANNELS // 2) / (CHANNELS // 2))
    x = np.concatenate([np.cos(1000 * timestep * frequencies), np.sin(1000 * timestep * frequencies)])
    for layer in ("linear_1", "linear_2"):
        name = f"time_text_embed.timestep_embedder.{layer}"
        x = silu(weights[f"{name}.weight"] @ x + weights[f"{name}.bias"])
    return x


def expected(weights: dict[str, Float64], *, zero_cond_t: bool) -> Float64:
    rows = []
    for timestep in SIGMAS[:-1].astype(np.float64):
        at_t, at_0 = conditioning(weights, timestep), conditioning(weights, 0.0)
        row = []
        for layer in range(LAYERS):
            streams = [(at_t, "img_mod"), (at_0, "img_mod"), (at_t, "txt_mod")]
            for x, stream in streams if zero_cond_t else (streams[0], streams[2]):
                name = f"transformer_blocks.{layer}.{stream}.1"
                parts = np.split(weights[f"{name}.weight"] @ x + weights[f"{name}.bias"], 6)
                parts[1], parts[4] = 1 + parts[1], 1 + parts[4]
                row += parts
        scale, shift = np.split(weights["norm_out.linear.weight"] @ at_t + weights["norm_out.linear.bias"], 2)
        row += [1 + scale, shift]
        rows.append(np.concatenate(row))
    return np.stack(rows)


@pytest.mark.parametrize("zero_cond_t", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_float64(make: Callable[..., Case], dtype: str, zero_cond_t: bool) -> None:
    folder, record, weights = make(dtype=dtype, zero_cond_t=zero_cond_t)
    flat = compute_tables(BundleModulation(folder, record), record, SIGMAS)
    wanted = expected(weights, zero_cond_t=zero_cond_t)
    assert flat.dtype == np.float32
    assert flat.shape == wanted.shape
    assert wanted.std() > 0.5
    # 1000 t is rounded to float32 before its cosine: an error of up to 3e-5 in an angle of 1000
    np.testing.assert_allclose(flat, wanted, rtol=0, atol=3e-4)
    assert np.linalg.norm(flat - wanted) / np.linalg.norm(wanted) < 2e-5


def test_shapes_and_order(make: Callable[..., Case]) -> None:
    folder, record, _ = make()
    flat = compute_tables(BundleModulation(folder, record), record, SIGMAS)
    tables = split_tables(flat, record)
    assert tables.blocks.shape == (5, LAYERS, 18 * WIDTH)
    assert tables.out.shape == (5, 2 * WIDTH)
    assert np.array_equal(np.concatenate([tables.blocks.reshape(5, -1), tables.out], axis=1), flat)


def test_timesteps_are_rounded_as_diffusers_does() -> None:
    """sigma * 1000 / 1000 in float32 is not always sigma."""
    spec = SchedulerSpec(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9, max_image_seq_len=8192)
    values = sigmas(spec, steps=40, noise_tokens=4096)
    seen = timesteps_of(values)
    assert seen.dtype == np.float32
    assert len(seen) == 40
    assert list(seen) == [np.float32(np.float32(s * np.float32(1000)) / np.float32(1000)) for s in values[:-1]]
    assert not np.array_equal(seen, values[:-1])


def test_progress_goes_block_by_block(make: Callable[..., Case]) -> None:
    folder, record, _ = make()
    seen: list[tuple[int, int]] = []
    compute_tables(
        BundleModulation(folder, record), record, SIGMAS, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(n + 1, LAYERS) for n in range(LAYERS)]


def test_one_large_weight_is_in_memory_at_a_time(make: Callable[..., Case]) -> None:
    """The weights of a published block's modulation are 226 MB each in float32."""
    folder, record, _ = make()
    stored = BundleModulation(folder, record)
    read: list[weakref.ref[NDArray[np.float32]]] = []

    class Watched:
        def read(self, name: str) -> NDArray[np.float32]:
            held = [weight for weight in read if weight() is not None]
            assert not (held and name.endswith(".weight")), name
            array = stored.read(name).copy()
            if "_mod" in name and name.endswith(".weight"):
                read.append(weakref.ref(array))
            return array

    assert np.array_equal(compute_tables(Watched(), record, SIGMAS), compute_tables(stored, record, SIGMAS))
    assert len(read) == 2 * LAYERS


def test_large_values_do_not_warn() -> None:
    """silu of a very negative number is 0, and exp of it overflows on the way."""
    assert list(silu_of(np.array([-1e4, 0, 100], np.float32))) == [0, 0, 100]


# bfloat16


@pytest.mark.parametrize("count", [1 << 16])
def test_bfloat16_rounds_to_nearest_even(count: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, count).astype(np.float32) * np.float32(10.0) ** rng.integers(-20, 20, count)
    halfway = (rng.integers(0, 1 << 15, 1000, np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.concatenate([x.astype(np.float32), halfway[np.isfinite(halfway)], [np.float32(0), np.float32(-0.0)]])
    bits = narrow(x)
    assert bits.dtype == np.uint16
    assert np.array_equal(round_to_bfloat16(x), widen(bits))
    assert np.array_equal(bits, x.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_every_bfloat16_survives_a_round_trip() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = widen(bits)
    finite = np.isfinite(wide)
    assert finite.sum() > 65000
    assert np.array_equal(narrow(wide[finite]), bits[finite])
    assert np.array_equal(wide[finite], bits.view(ml_dtypes.bfloat16).astype(np.float32)[finite])


def test_the_name_depends_on_weights_and_schedule(make: Callable[..., Case]) -> None:
    _, record, _ = make()
    other_weights = replace(record, digest="1" * 64)
    names = {table_name(record, SIGMAS), table_name(other_weights, SIGMAS), table_name(record, SIGMAS[1:])}
    assert len(names) == 3
    assert table_name(record, SIGMAS.copy()) in names


def test_the_weights_of_a_bundle_that_are_cut_short(bundle: Path, tmp_path: Path) -> None:
    opened: Bundle = open_bundle(str(bundle))
    record = opened.manifest.model.modulation
    (tmp_path / "modulation.weights").write_bytes((bundle / "modulation.weights").read_bytes()[:-1])
    weights = BundleModulation(tmp_path, record)
    weights.read(record.tensors[0].name)
    with pytest.raises(
        BundleError, match="modulation.weights cannot be read .it is cut short.; build the bundle again"
    ):
        weights.read(record.tensors[-1].name)
    with pytest.raises(KeyError):
        weights.read("no.such.tensor")
