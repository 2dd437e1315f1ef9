"""What tests of quantization begin from: the tiny checkpoint, opened, and its calibration over a few samples."""

from pathlib import Path
from typing import Any

import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.samples import CalibrationSample, draw_samples, read_images
from tests.support.images import smooth_image


@pytest.fixture(scope="module")
def tiny_checkpoint(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def readers(tiny_checkpoint: Checkpoint) -> dict[Any, TensorReader]:
    return {part: tiny_checkpoint.reader(part) for part in ("transformer", "text_encoder", "vae")}


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(150, 90), (80, 120)]):
        smooth_image(*size, number).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def samples(image_folder: Path) -> tuple[CalibrationSample, ...]:
    return draw_samples(read_images(image_folder, 32), INSTRUCTIONS, 8)


@pytest.fixture(scope="module")
def calibration(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], samples: tuple[CalibrationSample, ...]
) -> Calibration:
    return measure(tiny_checkpoint, readers, samples, model=tiny_checkpoint.digest())
