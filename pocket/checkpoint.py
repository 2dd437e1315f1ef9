"""The pocket checkpoint: ``python -m pocket.checkpoint FOLDER OUT`` writes what a training in FOLDER has come to.

Configs and tokenizer are those of ``qie.compiler.random_checkpoint``; weights are bfloat16, named as diffusers and
transformers name them.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import Tensor

from pocket.edits import EDITS
from pocket.run import averaged
from pocket.train_vae import unfold
from qie.compiler.architecture import ARCHITECTURES
from qie.compiler.random_checkpoint import write_checkpoint

__all__ = ["write", "write_configs"]

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
    index = out / "model_index.json"
    settings = json.loads(index.read_text(encoding="utf-8"))
    settings["_qie"]["about"] = ABOUT
    index.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    mean, std = torch.load(training / "latents.pt", weights_only=True)
    config = out / "vae" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    whole = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(out / "vae"))
    _save(unfold(averaged(training / "vae"), whole), out / "vae" / "diffusion_pytorch_model.safetensors")

    weights = averaged(training / "editor")
    parts = {part: {} for part in ("transformer", "text_encoder")}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    encoder = parts["text_encoder"]
    encoder["lm_head.weight"] = encoder["model.language_model.embed_tokens.weight"]  # it says nothing in an edit
    _save(parts["transformer"], out / "transformer" / "diffusion_pytorch_model.safetensors")
    _save(encoder, out / "text_encoder" / "model.safetensors")


def _save(weights: dict[str, Tensor], path: Path) -> None:
    save_file({name: w.bfloat16().contiguous().clone() for name, w in weights.items()}, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write(options.training, options.out)
    files = sorted(options.out.rglob("*.safetensors"))
    print(f"{options.out}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
