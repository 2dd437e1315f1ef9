"""What is killed in tests/faults/test_kills.py, each with its imports done before it starts."""

from pathlib import Path

from PIL import Image

from qie.compiler.packing import build as packing
from qie.compiler.packing import pack
from qie.compiler.planning import checks, estimate
from qie.compiler.planning.resolve import plan_build
from qie.engines.bundle.bundle import open_bundle, remove_bundle
from qie.engines.editing import edit as editing
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.inputs.image import save_image
from qie.engines.sessions import onnxruntime

__all__ = ["build", "edit", "remove"]

IMPORTED = (checks, editing, estimate, onnxruntime, pack)
"""Loaded lazily elsewhere; here before the first operation."""


def build(checkpoint: str, destination: str) -> None:
    packing.build(plan_build(checkpoint, out=destination))


def remove(bundle: str) -> None:
    remove_bundle(Path(bundle))


def edit(bundle: str, image: str, out: str) -> None:
    request = Request(images=[Image.open(image).convert("RGB")], instructions=["make it red"], seeds=[1], steps=7,
                      guidance=1.0, size=(64, 64))  # fmt: skip
    save_image(Editor(open_bundle(bundle)).edit(request).images[0], Path(out))
