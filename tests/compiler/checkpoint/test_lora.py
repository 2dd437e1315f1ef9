"""LoRAs: every key style gives the same difference, and nothing in a file is dropped silently."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qie.compiler.checkpoint.lora import Lora, fused_reader, open_lora, parse_lora
from qie.compiler.checkpoint.safetensors import SafetensorsReader, open_file
from qie.engines.errors import CheckpointError

SHAPES = {
    "img_in": (12, 8),
    "norm_out.linear": (24, 12),
    "time_text_embed.timestep_embedder.linear_1": (12, 6),
    "transformer_blocks.0.attn.to_q": (12, 12),
    "transformer_blocks.0.attn.to_out.0": (12, 10),
    "transformer_blocks.0.attn.add_k_proj": (10, 12),
    "transformer_blocks.0.img_mlp.net.0.proj": (48, 12),
    "transformer_blocks.11.img_mod.1": (72, 12),
    "transformer_blocks.1.txt_mlp.net.2": (12, 48),
}
RANK = 3
ALPHA = 1.5


def draw(module: str, side: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(f"{module}/{side}".encode()).digest()[:4])
    out, inner = SHAPES[module]
    return np.random.default_rng(seed).standard_normal((RANK, inner) if side == "down" else (out, RANK), np.float32)


def difference(module: str, scale: float) -> np.ndarray:
    return scale * draw(module, "up").astype(np.float64) @ draw(module, "down").astype(np.float64)


def write(path: Path, style: str, alpha: float | None = None, **extra: np.ndarray) -> Path:
    """A LoRA of all modules. ``style`` is a key of a module with {m} for its name and {s} for the side."""
    down, up = ("lora_A", "lora_B") if "PEFT" in style else ("lora_down", "lora_up")
    tensors = dict(extra)
    for module in SHAPES:
        name = module.replace(".", "_") if style.startswith("lora_unet_") else module
        for side, key in (("down", down), ("up", up)):
            tensors[style.replace("PEFT", "{s}").format(m=name, s=key)] = draw(module, side)
        if alpha is not None:
            tensors[style[: style.index("{m}")] + name + ".alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


STYLES = {
    "diffusers": "transformer.{m}.PEFT.weight",
    "peft": "{m}.PEFT.weight",
    "peft-default": "{m}.PEFT.default.weight",
    "ai-toolkit": "diffusion_model.{m}.PEFT.weight",
    "kohya": "lora_unet_{m}.{s}.weight",
    "lightning": "{m}.{s}.weight",
    "comfy": "diffusion_model.{m}.{s}.weight",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> SafetensorsReader:
    """The transformer's tensors; biases and a norm are no layers that a LoRA could change."""
    rng = np.random.default_rng(7)
    tensors = {
        f"{module}.weight": rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for module, shape in SHAPES.items()
    }
    tensors["img_in.bias"] = rng.standard_normal(12).astype(ml_dtypes.bfloat16)
    tensors["txt_norm.weight"] = rng.standard_normal(12).astype(ml_dtypes.bfloat16)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    return open_file(path)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_gives_the_same_difference(tmp_path: Path, style: str, alpha: float | None) -> None:
    lora = open_lora(write(tmp_path / "a.safetensors", STYLES[style], alpha), 0.8)
    for module, shape in SHAPES.items():
        delta = lora.delta(f"{module}.weight", shape)
        assert delta is not None and delta.dtype == np.float32 and delta.shape == shape
        scale = 0.8 * (1 if alpha is None else alpha / RANK)
        np.testing.assert_allclose(delta, difference(module, scale), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("style", STYLES)
def test_alpha_means_what_it_means_to_diffusers(tmp_path: Path, style: str, alpha: float | None) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.support.diffusers import convert_lora

    lora = open_lora(write(tmp_path / "a.safetensors", STYLES[style], alpha), 1.0)
    stored = {name: torch.from_numpy(lora.reader.read(name).copy()) for name in lora.reader.names()}
    if style == "diffusers":  # diffusers removes this prefix elsewhere
        stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    converted = convert_lora(stored)
    assert len(converted) == 2 * len(SHAPES)
    for module, shape in SHAPES.items():
        down, up = (converted[f"transformer.{module}.{side}.weight"].numpy() for side in ("lora_A", "lora_B"))
        np.testing.assert_allclose(lora.delta(f"{module}.weight", shape), up @ down, rtol=1e-5, atol=1e-5)


def test_stored_precision_is_widened_before_the_product(tmp_path: Path) -> None:
    up, down = draw("img_in", "up").astype(ml_dtypes.bfloat16), draw("img_in", "down").astype(np.float16)
    save_file({"img_in.lora_B.weight": up, "img_in.lora_A.weight": down}, tmp_path / "a.safetensors")
    delta = open_lora(tmp_path / "a.safetensors", 1.0).delta("img_in.weight", SHAPES["img_in"])
    np.testing.assert_allclose(delta, up.astype(np.float64) @ down.astype(np.float64), rtol=1e-5, atol=1e-5)


def test_untouched_tensors_have_no_difference(tmp_path: Path) -> None:
    lora = open_lora(write(tmp_path / "a.safetensors", STYLES["diffusers"]), 1.0)
    for name in ("img_in.bias", "txt_norm.weight", "img_in", "transformer_blocks.0.attn.to_k.weight"):
        assert lora.delta(name, (12, 8)) is None


def test_several_loras_add_up_in_float32(tmp_path: Path, checkpoint: SafetensorsReader) -> None:
    first = open_lora(write(tmp_path / "a.safetensors", STYLES["kohya"], ALPHA), 0.5)
    only = {f"img_in.{side}.weight": draw("img_in", s) for side, s in (("lora_A", "down"), ("lora_B", "up"))}
    save_file(only, tmp_path / "b.safetensors")
    second = open_lora(tmp_path / "b.safetensors", -2.0)
    fused = fused_reader(checkpoint, [first, second])
    assert set(fused.names()) == set(checkpoint.names())
    for module, shape in SHAPES.items():
        name = f"{module}.weight"
        expected = checkpoint.read(name).astype(np.float64) + difference(module, 0.5 * ALPHA / RANK)
        expected += difference(module, -2.0) if module == "img_in" else 0
        read = fused.read(name)
        assert (fused.dtype(name), fused.shape(name)) == ("float32", shape)
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, expected, rtol=1e-5, atol=2e-5)
    for name in ("img_in.bias", "txt_norm.weight"):
        assert fused.dtype(name) == "bfloat16"
        assert fused.read(name).tobytes() == checkpoint.read(name).tobytes()


def test_alpha_of_diffusers_metadata(tmp_path: Path) -> None:
    tensors = {f"transformer.img_in.{k}.weight": draw("img_in", s) for k, s in (("lora_A", "down"), ("lora_B", "up"))}
    for scope in ("transformer.", ""):
        metadata = {f"{scope}lora_alpha": 12, f"{scope}r": RANK, f"{scope}use_dora": False, f"{scope}alpha_pattern": {}}
        save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(metadata)})
        delta = open_lora(tmp_path / "a.safetensors", 1.0).delta("img_in.weight", SHAPES["img_in"])
        np.testing.assert_allclose(delta, difference("img_in", 12 / RANK), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ('{"transformer.use_dora": true}', "use_dora"),
        ('{"use_rslora": true}', "use_rslora"),
        ('{"transformer.alpha_pattern": {"img_in": 4}}', "alpha_pattern"),
        ("{broken", "broken"),
        ('{"lora_alpha": [1]}', "broken"),
        ("[1]", "broken"),
    ],
)
def test_metadata_that_cannot_be_followed(tmp_path: Path, metadata: str, says: str) -> None:
    tensors = {f"img_in.{key}.weight": draw("img_in", side) for key, side in (("lora_A", "down"), ("lora_B", "up"))}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=rf"a\.safetensors .*{says}"):
        open_lora(tmp_path / "a.safetensors", 1.0)


@pytest.mark.parametrize(
    "key",
    [
        "transformer_blocks.0.attn.to_q.diff",
        "transformer_blocks.0.attn.to_q.diff_b",
        "transformer.img_in.lora_magnitude_vector",
        "lora_unet_img_in.dora_scale",
        "lora_unet_img_in.hada_w1_a",
        "img_in.lokr_w1",
        "img_in.lora_B.bias",
    ],
)
def test_what_is_no_pair_of_matrices_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.safetensors", STYLES["lightning"], **{key: np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        open_lora(path, 1.0)
    assert key in str(caught.value) and "plain LoRA" in str(caught.value)


def test_layers_that_the_checkpoint_has_not_are_listed(tmp_path: Path, checkpoint: SafetensorsReader) -> None:
    extra = {}
    for number in range(8):
        extra[f"lora_te_layers_{number}.lora_down.weight"] = np.zeros((2, 4), np.float32)
        extra[f"lora_te_layers_{number}.lora_up.weight"] = np.zeros((4, 2), np.float32)
    lora = open_lora(write(tmp_path / "a.safetensors", STYLES["kohya"], **extra), 1.0)
    with pytest.raises(CheckpointError, match=r"a\.safetensors .*'lora_te_layers_0'.* and 3 more"):
        fused_reader(checkpoint, [lora])


def pair(path: Path, down: tuple[int, ...], up: tuple[int, ...], **extra: np.ndarray) -> Path:
    tensors = {"img_in.lora_A.weight": np.ones(down, np.float32), "img_in.lora_B.weight": np.ones(up, np.float32)}
    save_file({**tensors, **extra}, path)
    return path


@pytest.mark.parametrize(
    ("down", "up"), [((3, 8), (12, 4)), ((3, 8, 1, 1), (12, 3, 1, 1)), ((8,), (12,)), ((0, 8), (12, 0))]
)
def test_ranks_that_do_not_meet(tmp_path: Path, down: tuple[int, ...], up: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"'img_in', expected \[rank, in\]"):
        open_lora(pair(tmp_path / "a.safetensors", down, up), 1.0)


def test_another_shape_than_the_checkpoints(tmp_path: Path, checkpoint: SafetensorsReader) -> None:
    lora = open_lora(pair(tmp_path / "a.safetensors", (3, 12), (8, 3)), 1.0)
    says = r"'img_in\.weight' as \[8, 12\], but the checkpoint has \[12, 8\]"
    with pytest.raises(CheckpointError, match=says):
        fused_reader(checkpoint, [lora])
    with pytest.raises(CheckpointError, match=says):
        lora.delta("img_in.weight", (12, 8))


def test_half_a_pair_and_an_alpha_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"img_in.lora_A.weight": np.ones((3, 8), np.float32)}, path)
    with pytest.raises(CheckpointError, match="lacks the up matrix of 'img_in'"):
        open_lora(path, 1.0)
    save_file({"img_in.alpha": np.ones((), np.float32)}, path)
    with pytest.raises(CheckpointError, match="lacks the down and the up matrix of 'img_in'"):
        open_lora(path, 1.0)


def test_one_layer_in_two_styles(tmp_path: Path) -> None:
    path = pair(tmp_path / "a.safetensors", (3, 8), (12, 3), **{"lora_unet_img_in.lora_up.weight": np.ones((12, 3))})
    with pytest.raises(CheckpointError, match="both the up of one layer"):
        open_lora(path, 1.0)


def test_an_alpha_of_several_elements(tmp_path: Path) -> None:
    path = pair(tmp_path / "a.safetensors", (3, 8), (12, 3), **{"img_in.alpha": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match=r"'img_in\.alpha' has more than one element"):
        open_lora(path, 1.0)


def test_files_that_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
        open_lora(path, 1.0)
    path.write_text("not a LoRA")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is cut short or not a safetensors file"):
        open_lora(path, 1.0)
    with pytest.raises(CheckpointError, match="is no file, but a folder"):
        open_lora(tmp_path, 1.0)
    save_file({}, path)
    with pytest.raises(CheckpointError, match="is empty"):
        open_lora(path, 1.0)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number(tmp_path: Path, weight: float) -> None:
    with pytest.raises(CheckpointError, match="; give a number such as 0.8"):
        open_lora(pair(tmp_path / "a.safetensors", (3, 8), (12, 3)), weight)


def test_name_and_digest(tmp_path: Path) -> None:
    lora: Lora = open_lora(pair(tmp_path / "a.safetensors", (3, 8), (12, 3)), 1.0)
    assert lora.name == "a.safetensors"
    assert lora.digest() == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("dir/a.safetensors:-1", "dir/a.safetensors", -1.0),
        ("a.safetensors:.5", "a.safetensors", 0.5),
        ("a.safetensors:1e-1", "a.safetensors", 0.1),
        ("odd:name/a.safetensors", "odd:name/a.safetensors", 1.0),
        ("odd:name/a.safetensors:2", "odd:name/a.safetensors", 2.0),
        ("a.safetensors:nan", "a.safetensors:nan", 1.0),
        ("a.safetensors:", "a.safetensors:", 1.0),
    ],
)
def test_parse(text: str, path: str, weight: float) -> None:
    assert parse_lora(text) == (Path(path), weight)
