"""Damage to files, checkpoints and bundles."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qie.engines.bundle.sealed import seal

__all__ = ["Break", "change_json", "change_manifest", "change_tensor", "cut", "delete_tensor", "flip", "weights_of"]

Break = Callable[[Path], object]
"""Damages a file or folder."""


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change the byte in the middle of a file, whose size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def change_json(path: Path, **values: object) -> None:
    """Change keys of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_manifest(bundle: Path, **values: object) -> None:
    """Change keys of a bundle's manifest and seal it anew, as who forges one would."""
    path = bundle / "manifest.json"
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | values)))


def weights_of(checkpoint: Path, subfolder: str) -> Path:
    """The file of weights in a subfolder that has one."""
    return next((checkpoint / subfolder).glob("*.safetensors"))


def change_tensor(
    checkpoint: Path, subfolder: str, name: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    """Replace a tensor by ``change`` of it."""
    tensors = load_file(weights_of(checkpoint, subfolder))
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, weights_of(checkpoint, subfolder))


def delete_tensor(checkpoint: Path, subfolder: str, name: str) -> None:
    tensors = load_file(weights_of(checkpoint, subfolder))
    del tensors[name]
    save_file(tensors, weights_of(checkpoint, subfolder))
