"""Configs as typed dimensions: what is read, and one clear error for whatever is missing, wrong or not expressed."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.checkpoint.configs import LanguageConfig, TransformerConfig, VaeConfig, VisionConfig
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.errors import CheckpointError, ExportError, QieError

Read = Callable[[Mapping[str, Any]], Any]

READERS: dict[str, tuple[str, Read]] = {
    "transformer": ("transformer/config.json", TransformerConfig.from_config),
    "vision": ("text_encoder/config.json", VisionConfig.from_config),
    "language": ("text_encoder/config.json", LanguageConfig.from_config),
    "vae": ("vae/config.json", VaeConfig.from_config),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "2511"
    return write_checkpoint(folder, ARCHITECTURES["qwen-image-edit-2511"], weights=False)


def config(folder: Path, part: str, **changes: Any) -> dict[str, Any]:
    """The config that ``part`` is read from, with changes at any depth: ``vision_config__depth=3``; None deletes."""
    data: dict[str, Any] = json.loads((folder / READERS[part][0]).read_text())
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = data
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return data


def test_transformer(published: Path) -> None:
    found = TransformerConfig.from_config(config(published, "transformer"))
    assert found == TransformerConfig(
        layers=60,
        heads=24,
        head_dim=128,
        in_channels=64,
        joint_width=3584,
        axes_dims=(16, 56, 56),
        zero_cond_t=True,
    )
    assert (found.width, found.modulation_rows) == (3072, 18)


def test_transformer_without_zero_cond_t(published: Path) -> None:
    found = TransformerConfig.from_config(config(published, "transformer", zero_cond_t=None))
    assert not found.zero_cond_t
    assert found.modulation_rows == 12


def test_vision(published: Path) -> None:
    found = VisionConfig.from_config(config(published, "vision"))
    assert found == VisionConfig(
        depth=32,
        width=1280,
        heads=16,
        intermediate=3420,
        out_width=3584,
        patch_width=1176,
        merge_size=2,
        full_attention_blocks=(7, 15, 23, 31),
    )
    assert found.head_dim == 80


def test_vision_by_the_other_name_of_its_channels(published: Path) -> None:
    data = config(published, "vision", vision_config__in_channels=None)
    assert VisionConfig.from_config(data).patch_width == 1176
    data["vision_config"]["in_chans"] = 1
    assert VisionConfig.from_config(data).patch_width == 1176 // 3


LANGUAGE = LanguageConfig(
    layers=28,
    width=3584,
    heads=28,
    kv_heads=4,
    intermediate=18944,
    vocabulary=152064,
    eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
)


def test_language_in_the_nested_form(published: Path) -> None:
    data = config(published, "language")
    flat = {key: data["text_config"].get(key) for key in data if key in data["text_config"]}
    assert flat
    for key in set(flat) - {"model_type"}:
        data[key] = "not read"
    assert LanguageConfig.from_config(data) == LANGUAGE
    assert LANGUAGE.head_dim == 128


def test_language_in_the_flat_form(published: Path) -> None:
    assert LanguageConfig.from_config(config(published, "language", text_config=None)) == LANGUAGE


def test_language_with_the_rope_of_transformers_5(published: Path) -> None:
    data = config(published, "language", text_config=None, rope_scaling=None, rope_theta=None)
    data["rope_parameters"] = {"mrope_section": [16, 24, 24], "rope_theta": 500000, "rope_type": "default"}
    assert LanguageConfig.from_config(data).rope_theta == 500000


def test_language_without_groups_or_rope(published: Path) -> None:
    data = config(published, "language", text_config=None, rope_scaling=None, rope_theta=None, num_key_value_heads=None)
    found = LanguageConfig.from_config(data)
    assert (found.kv_heads, found.rope_theta, found.mrope_section) == (28, 1e6, (16, 24, 24))


def test_vae(published: Path) -> None:
    found = VaeConfig.from_config(config(published, "vae"))
    assert (found.base_width, found.z_dim, found.multipliers, found.blocks) == (96, 16, (1, 2, 4, 4), 2)
    assert found.latents_mean[:2] == (-0.7571, -0.7089)
    assert found.latents_std[-1] == 1.916


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "guidance_embeds = True is not supported"),
        ("transformer", {"use_additional_t_cond": True}, "use_additional_t_cond = True is not supported"),
        ("transformer", {"use_layer3d_rope": True}, "use_layer3d_rope = True is not supported"),
        ("vision", {"vision_config__hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported.*for 'silu'"),
        ("language", {"text_config__hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("language", {"text_config__use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("vae", {"attn_scales": [1.0]}, r"attn_scales = \[1.0\] is not supported"),
        ("vae", {"input_channels": 4}, "input_channels = 4 is not supported"),
        (
            "vae",
            {"dim_mult": [1, 2, 4]},
            "dim_mult has 3 levels, expected 4 for latents of 1/8 of the image; use a checkpoint",
        ),
    ],
)
def test_what_the_graphs_do_not_express(published: Path, part: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        READERS[part][1](config(published, part, **change))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("transformer", {"guidance_embeds": False, "use_layer3d_rope": False, "use_additional_t_cond": False}),
        ("vae", {"attn_scales": [], "input_channels": 3}),
        ("vision", {"vision_config__hidden_act": "silu"}),
    ],
)
def test_the_usual_value_of_an_option_is_fine(published: Path, part: str, change: dict[str, Any]) -> None:
    assert READERS[part][1](config(published, part, **change)) == READERS[part][1](config(published, part))


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        (
            "transformer",
            {"num_layers": None},
            "transformer/config.json has no 'num_layers'; restore the checkpoint's config",
        ),
        ("transformer", {"num_layers": 0}, "num_layers = 0, expected a whole number from 1 to 1000; restore"),
        ("transformer", {"num_attention_heads": 2.0}, "num_attention_heads = 2.0, expected a whole number"),
        ("transformer", {"axes_dims_rope": [16, 112]}, r"axes_dims_rope = \[16, 112\], expected a list of 3 whole"),
        ("transformer", {"axes_dims_rope": [16, 56, 64]}, "adds up to 136, expected attention_head_dim = 128; restore"),
        ("transformer", {"axes_dims_rope": "16"}, "axes_dims_rope = '16', expected a list"),
        ("vision", {"vision_config": None}, "vision_config has no 'patch_size'"),
        ("vision", {"vision_config": [1]}, r"vision_config = \[1\], expected an object"),
        ("vision", {"vision_config__num_heads": 7}, "num_heads = 7, expected a divisor of 1280"),
        ("vision", {"vision_config__fullatt_block_indexes": [-1]}, "whole numbers from 0 to 1000"),
        ("language", {"text_config__num_key_value_heads": 3}, "num_key_value_heads = 3, expected a divisor of 28"),
        ("language", {"text_config__num_attention_heads": 27}, "num_attention_heads = 27, expected a divisor of 3584"),
        ("language", {"text_config__rope_scaling": {"mrope_section": [16, 24, 25]}}, "adds up to 65, expected half"),
        ("language", {"text_config__rope_scaling": {"mrope_section": [64]}}, r"mrope_section = \[64\], expected a"),
        ("language", {"text_config__rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny', expected a number"),
        ("language", {"text_config__rope_theta": -1}, "rope_theta = -1(.0)?, expected a number from 1"),
        ("language", {"text_config": 5}, "text_config = 5, expected an object"),
        ("vae", {"latents_mean": [0.5]}, "latents_mean has 1 values, expected z_dim = 16"),
        ("vae", {"latents_std": [True] * 16}, "latents_std = True, expected a number"),
        ("vae", {"latents_std": 1.0}, "latents_std = 1.0, expected a list of numbers"),
        ("vae", {"base_dim": "96"}, "base_dim = '96', expected a whole number"),
    ],
)
def test_what_is_missing_or_wrong(published: Path, part: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as problem:
        READERS[part][1](config(published, part, **change))
    assert READERS[part][0] in str(problem.value)


@pytest.mark.parametrize("part", READERS)
@pytest.mark.parametrize("value", [-1, 0, "x", [], {}, ["a", "b", "c"], 3.5, True, {"a": 1}], ids=str)
def test_no_value_of_any_key_is_a_traceback(published: Path, part: str, value: Any) -> None:
    data = config(published, part)
    nested = {"vision": "vision_config", "language": "text_config"}.get(part)
    keys = [f"{nested}__{key}" for key in data[nested]] if nested else list(data)
    refused = 0
    for key in keys:
        try:
            READERS[part][1](config(published, part, **{key: value}))
        except QieError:
            refused += 1
    assert refused >= 3
