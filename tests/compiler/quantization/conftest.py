"""What tests of quantization begin from: the tiny checkpoint, opened, and its calibration over a few samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qie.compiler.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization.calibrate import calibrate
from qie.compiler.quantization.calibration import Calibration
from qie.compiler.quantization.samples import INSTRUCTIONS, Sample, draw_samples, read_images


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(checkpoint))


@pytest.fixture(scope="module")
def readers(opened: Checkpoint) -> dict[Any, TensorReader]:
    return {part: opened.reader(part) for part in ("transformer", "text_encoder", "vae")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(150, 90), (80, 120)]):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def samples(pictures: Path) -> tuple[Sample, ...]:
    return draw_samples(read_images(pictures), INSTRUCTIONS, 8)


@pytest.fixture(scope="module")
def found(opened: Checkpoint, readers: dict[Any, TensorReader], samples: tuple[Sample, ...]) -> Calibration:
    return calibrate(opened, readers, samples, model=opened.digest())
