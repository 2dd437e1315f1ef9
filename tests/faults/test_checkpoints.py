"""Checkpoints that are damaged, incomplete or of another model."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from tests.support.command_line import Qie, Refusal, assert_says
from tests.support.damage import Break, change_json, change_tensor, cut, delete_tensor, weights_of

TINY = ARCHITECTURES["tiny"]

DOWNLOAD = "[Dd]ownload"
BAD_CHECKPOINTS: dict[str, tuple[Break, str]] = {
    "no component": (lambda c: shutil.rmtree(c / "vae"), rf"lacks vae/config.json; {DOWNLOAD}"),
    "no weights": (lambda c: weights_of(c, "vae").unlink(), f"holds no weights, .*; {DOWNLOAD}"),
    "no tokenizer": (lambda c: [shutil.rmtree(c / f) for f in ("tokenizer", "processor")], "lacks tokenizer/"),
    "no index": (lambda c: (c / "model_index.json").unlink(), "has no model_index.json; name a checkpoint"),
    "another pipeline": (
        lambda c: change_json(c / "model_index.json", _class_name="FluxPipeline"),
        "is for 'FluxPipeline', expected QwenImageEditPipeline or QwenImageEditPlusPipeline; name a",
    ),
    "config no JSON": (lambda c: cut(c / "transformer" / "config.json"), f"is not JSON .*; {DOWNLOAD}"),
    "config with a number beyond all floats": (
        lambda c: change_json(c / "scheduler" / "scheduler_config.json", shift=10**400),
        f"is not JSON .a number of 401 digits.; {DOWNLOAD}",
    ),
    "config key missing": (
        lambda c: (c / "transformer" / "config.json").write_text("{}"),
        "transformer/config.json has no 'axes_dims_rope'; restore the checkpoint's config",
    ),
    "config of another kind": (
        lambda c: change_json(c / "transformer" / "config.json", num_layers="two"),
        "transformer/config.json: num_layers = 'two', expected a whole number from 1 to 1000; restore",
    ),
    "config of another model": (
        lambda c: change_json(c / "transformer" / "config.json", use_layer3d_rope=True),
        "use_layer3d_rope = True is not supported",
    ),
    "configs of different models": (
        lambda c: change_json(c / "transformer" / "config.json", joint_attention_dim=128),
        "text encoder is 64 wide, the transformer expects 128; take all components from one checkpoint",
    ),
    "shard cut short": (lambda c: cut(weights_of(c, "transformer")), f"is cut short, .*; {DOWNLOAD}"),
    "tensor missing": (
        lambda c: delete_tensor(c, "transformer", "transformer_blocks.1.attn.to_q.weight"),
        f"tensor 'transformer_blocks.1.attn.to_q.weight' is missing.*{DOWNLOAD}",
    ),
    "tensor of another shape": (
        lambda c: change_tensor(c, "transformer", "transformer_blocks.1.img_mlp.net.2.weight", np.transpose),
        rf"img_mlp.net.2.weight' has shape \[256, 64\], expected \[.*{DOWNLOAD}",
    ),
    "modulation missing": (
        lambda c: delete_tensor(c, "transformer", "transformer_blocks.1.img_mod.1.weight"), f"is missing.*{DOWNLOAD}"),
    "tensor not finite": (
        lambda c: change_tensor(c, "vae", "decoder.conv_in.bias", lambda bias: np.full_like(bias, np.inf)),
        f"decoder.conv_in.bias' has infinite or NaN elements.*{DOWNLOAD}"),
    "tokenizer of another model": (
        lambda c: change_json(c / "text_encoder" / "config.json", image_token_id=5),
        r"image_token_id = 5, but <\|image_pad\|> is \d+ in the tokenizer; take both from the same checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoint(qie: Qie, refusal: Refusal, bad_checkpoint: Path, qie_home: Path, name: str) -> None:
    break_it, expected = BAD_CHECKPOINTS[name]
    break_it(bad_checkpoint)
    assert_says(refusal(qie("build", "bad")), expected)
    assert list(qie_home.glob("bundles/*")) == []


def test_checkpoint_in_a_process_of_its_own(
    process: Qie, refusal: Refusal, bad_checkpoint: Path, qie_home: Path
) -> None:
    delete_tensor(bad_checkpoint, "vae", "decoder.conv_out.weight")
    assert_says(refusal(process("build", "bad")), "decoder.conv_out.weight' is missing")
    assert list(qie_home.glob("bundles/*")) == []


def test_truncated_shard(qie: Qie, refusal: Refusal, workplace: Path, qie_home: Path) -> None:
    folder = write_checkpoint(workplace / "bad", TINY, shard_bytes=300_000)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    cut(shards[1])
    assert_says(refusal(qie("build", "bad")), f"{shards[1].name} is cut short, .*; {DOWNLOAD}")
    shards[1].unlink()
    assert_says(refusal(qie("build", "bad")), f"{shards[1].name} is missing, .*; {DOWNLOAD}")


def test_parts_of_different_models_are_found_before_anything_is_written(
    qie: Qie, bad_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the build has begun")

    monkeypatch.setattr("qie.compiler.packing.pieces.open_pieces", fail)
    change_json(bad_checkpoint / "text_encoder" / "config.json", image_token_id=5)
    assert qie("build", "bad").returncode == 2


@pytest.mark.parametrize("name", ["no/such/folder", "nope", "owner/model"])
def test_no_checkpoint(process: Qie, refusal: Refusal, name: str) -> None:
    message = refusal(process("build", name, "--dry-run"))
    assert_says(
        message,
        "there is no checkpoint .*; name a folder, pocket, or a hub id|check the id and run `hf download owner/model`",
    )
