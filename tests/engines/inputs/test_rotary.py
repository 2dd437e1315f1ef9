"""latents.py against diffusers' transformer and pipeline."""

import numpy as np
import pytest

from qie.engines.bundle.specs import RotarySpec
from qie.engines.errors import RequestError
from qie.engines.inputs import rotary as latents
from qie.engines.inputs.rotary import MAX_POSITIONS, noise_latents, pack, rotary_tables

GRIDS = [
    [(64, 64), (64, 64)],
    [(2, 3), (3, 2)],
    [(1, 1), (1, 1)],
    [(5, 8), (7, 3), (9, 11), (4, 4)],
    [(48, 84), (64, 64), (30, 130)],
]


@pytest.mark.parametrize("axes_dims", [(16, 56, 56), (8, 12, 12), (4, 6, 22)])
@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("text_tokens", [1, 213])
def test_rotary_tables_equal_qwen_embed_rope(axes_dims, grids, text_tokens):
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    rope = transformer.QwenEmbedRope(theta=10000, axes_dim=list(axes_dims), scale_rope=True)
    image, text = rope([[(1, *grid) for grid in grids]], max_txt_seq_len=text_tokens, device=torch.device("cpu"))
    expected = torch.cat([text, image])

    cos, sin = rotary_tables(RotarySpec(axes_dims=axes_dims), text_tokens=text_tokens, grids=grids)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (text_tokens + sum(h * w for h, w in grids), sum(axes_dims) // 2)
    assert_rotations_equal(cos, sin, expected, text_tokens + max(max(grid) for grid in grids))


def assert_rotations_equal(cos, sin, expected, positions):
    """As torch on any CPU gives them: its power may be off by the last bit of a frequency, and the largest of
    ``positions`` makes as many bits of an angle."""
    tolerance = 2e-7 + positions * 2.0**-24
    np.testing.assert_allclose(cos, expected.real.numpy(), atol=tolerance, rtol=0)
    np.testing.assert_allclose(sin, expected.imag.numpy(), atol=tolerance, rtol=0)


def test_rotary_tables_agree_at_the_end_of_the_table():
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    rope = transformer.QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    text_tokens = MAX_POSITIONS - 10
    _, text = rope([[(1, 20, 4)]], max_txt_seq_len=text_tokens, device=torch.device("cpu"))
    cos, sin = rotary_tables(RotarySpec(axes_dims=(16, 56, 56)), text_tokens=text_tokens, grids=[(20, 4)])
    assert_rotations_equal(cos[:text_tokens], sin[:text_tokens], text, MAX_POSITIONS)


def test_text_starts_behind_the_largest_image():
    spec = RotarySpec(axes_dims=(2, 2, 2))  # one pair an axis of frequency 1: the angle is the position
    cos, sin = rotary_tables(spec, text_tokens=1, grids=[(2, 2), (2, 6)])
    np.testing.assert_allclose(cos[0], np.cos([3, 3, 3]), atol=1e-7)
    np.testing.assert_allclose(sin[1], np.sin([0, -1, -1]), atol=1e-7)
    np.testing.assert_allclose(sin[-1], np.sin([1, 0, 2]), atol=1e-7)


def test_text_beyond_the_table_is_refused():
    spec = RotarySpec(axes_dims=(2, 2, 2))
    rotary_tables(spec, text_tokens=MAX_POSITIONS - 4, grids=[(8, 2)])
    with pytest.raises(RequestError, match=r"4093 tokens.*4092"):
        rotary_tables(spec, text_tokens=MAX_POSITIONS - 3, grids=[(8, 2)])


@pytest.mark.parametrize(("batch", "channels", "height", "width"), [(1, 16, 6, 10), (3, 4, 2, 2), (2, 16, 14, 4)])
def test_packing_equals_the_pipeline(batch, channels, height, width):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support.diffusers import pack_latents

    values = np.random.default_rng(0).standard_normal((batch, channels, height, width)).astype(np.float32)
    expected = pack_latents(torch.from_numpy(values), batch, channels, height, width).numpy()
    packed = pack(values)
    np.testing.assert_array_equal(packed, expected)


def test_packing_is_channel_major_within_a_patch():
    values = np.arange(2 * 2 * 4, dtype=np.float32).reshape(1, 2, 2, 4)
    np.testing.assert_array_equal(pack(values)[0, 1], [2, 3, 6, 7, 10, 11, 14, 15])


def test_noise_is_packed_seed_by_seed(monkeypatch):
    calls = []

    def standard_normal(shape, *, seed, dtype):
        calls.append((shape, seed, dtype))
        return np.full(shape, seed, np.float32)

    monkeypatch.setattr(latents, "standard_normal", standard_normal)
    noise = noise_latents([7, 3], 48, 80, 16, "bfloat16")
    assert calls == [((1, 1, 16, 6, 10), 7, "bfloat16"), ((1, 1, 16, 6, 10), 3, "bfloat16")]
    assert noise.shape == (2, 15, 64)
    assert noise.dtype == np.float32
    assert [set(row.ravel()) for row in noise] == [{7.0}, {3.0}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_noise_equals_what_the_pipeline_draws(dtype):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support.diffusers import pack_latents

    expected = []
    for seed in (0, 42):
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((1, 1, 16, 6, 10), generator=generator, dtype=getattr(torch, dtype))
        expected.append(pack_latents(noise, 1, 16, 6, 10))
    noise = noise_latents([0, 42], 48, 80, 16, dtype)
    np.testing.assert_allclose(noise, torch.cat(expected).float().numpy(), atol=1e-5 if dtype == "float32" else 0.02)
