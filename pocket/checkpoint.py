"""The pocket checkpoint: ``python -m pocket.checkpoint FOLDER OUT`` writes what a training in FOLDER has come to.

Configs and tokenizer are those of ``qie.compiler.synthetic.checkpoint``; weights are bfloat16, named as diffusers and
transformers name them.
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

from pocket.edits import EDITS
from pocket.run import averaged, begin
from pocket.train_vae import unfold
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint

__all__ = ["FILES", "read", "write", "write_configs"]

FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}

ABOUT = (
    f"pocket is a small model that was taught {len(EDITS)} kinds of edits of pictures of about 128x128 pixels; of "
    "other instructions it makes what it can"
)


def write_configs(folder: Path) -> None:
    """Configs and tokenizer, whose vocabulary has every word of every instruction; nothing where they are there."""
    if not folder.is_dir():
        said = [p.format(**{k: " ".join(v) for k, v in e.options.items()}) for e in EDITS.values() for p in e.phrases]
        words = " ".join(["", *said, "Picture 2: and then please!"])
        write_checkpoint(folder, ARCHITECTURES["pocket"], words=words, weights=False)


def write(training: Path, out: Path) -> None:
    """Write the checkpoint to ``out``, over an earlier one."""
    with tempfile.TemporaryDirectory(dir=training) as fresh:
        write_configs(Path(fresh) / "checkpoint")
        shutil.copytree(Path(fresh) / "checkpoint", out, dirs_exist_ok=True)
    own = json.loads((out / "model_index.json").read_text(encoding="utf-8"))["_qie"]
    _change(out / "model_index.json", _qie={**own, "about": ABOUT})
    mean, std = torch.load(training / "latents.pt", weights_only=True)
    _change(out / "vae" / "config.json", latents_mean=mean.tolist(), latents_std=std.tolist())
    whole = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(out / "vae"))
    weights, step = averaged(training / "vae")
    _save(unfold(weights, whole), step, out / FILES["vae"])

    weights, step = averaged(training / "reader")
    encoder = _of(weights, "text_encoder.")
    encoder["lm_head.weight"] = encoder["model.language_model.embed_tokens.weight"]  # it says nothing in an edit
    _save(encoder, step, out / FILES["text_encoder"])
    weights, step = averaged(training / "editor")
    _save(_of(weights, "transformer."), step, out / FILES["transformer"])


def read(checkpoint: Path, training: Path) -> None:
    """Begin a training in ``training``, which does not exist, where the one of ``checkpoint`` ended."""
    training.mkdir(parents=True)
    settings = json.loads((checkpoint / "vae" / "config.json").read_text(encoding="utf-8"))
    torch.save(tuple(torch.tensor(settings[key]) for key in ("latents_mean", "latents_std")), training / "latents.pt")
    vae, step = _load(checkpoint / FILES["vae"])
    slices = {
        name: value[:, :, -1] if value.ndim == 5 else value for name, value in vae.items() if ".time_conv." not in name
    }
    begin(training / "vae", slices, step)
    for name, part in (("reader", "text_encoder"), ("editor", "transformer")):
        weights, step = _load(checkpoint / FILES[part])
        begin(training / name, {f"{part}.{key}": value for key, value in weights.items()}, step)


def _change(path: Path, **settings: Any) -> None:
    """Write ``settings`` into a JSON file."""
    known = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**known, **settings}, indent=2) + "\n", encoding="utf-8")


def _of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _save(weights: dict[str, Tensor], step: int, path: Path) -> None:
    stored = {name: value.bfloat16().contiguous().clone() for name, value in weights.items()}
    save_file(stored, path, metadata={"format": "pt", "step": str(step)})


def _load(path: Path) -> tuple[dict[str, Tensor], int]:
    """Weights in float32, and the steps that made them."""
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    return {name: value.float() for name, value in load_file(path).items()}, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--read", action="store_true", help="begin a training from the checkpoint instead")
    options = parser.parse_args()
    if options.read:
        read(options.out, options.training)
        return
    write(options.training, options.out)
    files = sorted(options.out.rglob("*.safetensors"))
    print(f"{options.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
