"""The pocket checkpoint: ``python -m pocket.checkpoint FOLDER OUT`` writes the averaged weights of a training.

Configs and tokenizer are those of ``qie.compiler.synthetic.checkpoint``. Weights are bfloat16 under the names of
diffusers and transformers.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pocket.data.edits import EDITS, Edit
from pocket.model.averages import averaged_weights, start_from
from pocket.model.vae import unfold
from qie.compiler.synthetic import checkpoint as synthetic
from qie.compiler.synthetic.architecture import ARCHITECTURES

__all__ = ["FILES", "read_checkpoint", "write_checkpoint", "write_configs"]

FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
"""Subfolder -> file of its weights."""

ABOUT = (
    f"a small model trained on {len(EDITS)} kinds of edits of images of about 128x128 pixels; other instructions run, "
    "but it was not trained on them"
)


def write_configs(folder: Path) -> None:
    """Write configs, and a tokenizer with every word of every instruction; an existing folder is left alone."""
    if not folder.is_dir():
        phrases = [phrase for edit in EDITS.values() for phrase in _phrases_with_all_options(edit)]
        words = " ".join(["", *phrases, "Picture 2: and then please!"])
        synthetic.write_checkpoint(folder, ARCHITECTURES["pocket"], words=words, weights=False)


def write_checkpoint(training: Path, out: Path) -> None:
    """Write the checkpoint of ``training`` to ``out``, over an earlier one."""
    with tempfile.TemporaryDirectory(dir=training) as temporary:
        write_configs(Path(temporary) / "checkpoint")
        shutil.copytree(Path(temporary) / "checkpoint", out, dirs_exist_ok=True)
    own = json.loads((out / "model_index.json").read_text(encoding="utf-8"))["_qie"]
    _change(out / "model_index.json", _qie={**own, "about": ABOUT})
    mean, std = torch.load(training / "latents.pt", weights_only=True)
    _change(out / "vae" / "config.json", latents_mean=mean.tolist(), latents_std=std.tolist())
    vae = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(out / "vae"))
    weights, step = averaged_weights(training / "vae")
    _save(unfold(weights, vae), step, out / FILES["vae"])

    weights, step = averaged_weights(training / "text_encoder")
    encoder = _below(weights, "text_encoder.")
    encoder["lm_head.weight"] = encoder["model.language_model.embed_tokens.weight"]  # required, and unused in an edit
    _save(encoder, step, out / FILES["text_encoder"])
    weights, step = averaged_weights(training / "transformer")
    _save(_below(weights, "transformer."), step, out / FILES["transformer"])


def read_checkpoint(checkpoint: Path, training: Path) -> None:
    """Start a training in the new folder ``training`` from the weights of ``checkpoint``."""
    training.mkdir(parents=True)
    settings = json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))
    torch.save(tuple(torch.tensor(settings[key]) for key in ("latents_mean", "latents_std")), training / "latents.pt")
    vae, step = _load(checkpoint / FILES["vae"])
    slices = {
        name: value[:, :, -1] if value.ndim == 5 else value for name, value in vae.items() if ".time_conv." not in name
    }
    start_from(training / "vae", slices, step)
    for subfolder in ("text_encoder", "transformer"):
        weights, step = _load(checkpoint / FILES[subfolder])
        start_from(training / subfolder, {f"{subfolder}.{name}": value for name, value in weights.items()}, step)


def _change(path: Path, **settings: Any) -> None:
    """Write ``settings`` into a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **settings}, indent=2) + "\n", encoding="utf-8")


def _phrases_with_all_options(edit: Edit) -> list[str]:
    """The phrases of ``edit``, with all values of each option in its place."""
    options = {key: " ".join(values) for key, values in edit.options.items()}
    return [phrase.format(**options) for phrase in edit.phrases]


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _save(weights: dict[str, Tensor], step: int, path: Path) -> None:
    stored = {name: value.bfloat16().contiguous().clone() for name, value in weights.items()}
    save_file(stored, path, metadata={"format": "pt", "step": str(step)})


def _load(path: Path) -> tuple[dict[str, Tensor], int]:
    """The weights in float32, and the number of steps of their training."""
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    return {name: value.float() for name, value in load_file(path).items()}, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--read", action="store_true", help="start a training from the checkpoint instead")
    options = parser.parse_args()
    if options.read:
        read_checkpoint(options.out, options.training)
        return
    write_checkpoint(options.training, options.out)
    files = sorted(options.out.rglob("*.safetensors"))
    print(f"{options.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
