"""prepare.py against diffusers."""

import numpy as np
import pytest
from PIL import Image

from qie.engines.bundle.specs import Areas
from qie.engines.errors import ImageError
from qie.engines.inputs.prepare import output_size, prepare, resize, to_uint8_HWC
from tests.support.images import noise_image

SIZES = [(1024, 1024), (640, 480), (333, 1000), (50, 49), (1920, 817), (8, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384, 256 * 256])
def test_output_size_equals_calculate_dimensions(size, area):
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    found = output_size(size, area)
    assert found == pipeline.calculate_dimensions(area, size[0] / size[1])
    assert all(side % 16 == 0 for side in found)


def test_a_side_rounded_to_nothing_is_refused():
    with pytest.raises(ImageError, match="too narrow"):
        output_size((1000, 50), 64 * 64)


@pytest.mark.parametrize("size", SIZES)
def test_edit_plus_prepares_as_the_pipeline(size):
    pytest.importorskip("torch")
    processor_class = pytest.importorskip("diffusers.image_processor").VaeImageProcessor
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    processor = processor_class(vae_scale_factor=16)
    source = noise_image(*size)
    areas = Areas(vae_area=256 * 256, condition_area=128 * 128)
    condition_width, condition_height = pipeline.calculate_dimensions(areas.condition_area, size[0] / size[1])
    vae_width, vae_height = pipeline.calculate_dimensions(areas.vae_area, size[0] / size[1])
    condition = processor.resize(source, condition_height, condition_width)
    vae_BCHW = processor.preprocess(source, vae_height, vae_width).numpy()

    found = prepare(source, areas)
    np.testing.assert_array_equal(np.asarray(found.vision), np.asarray(condition))
    assert found.vae.dtype == np.uint8
    np.testing.assert_allclose(found.vae / 127.5 - 1, vae_BCHW[0].transpose(1, 2, 0), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_edit_resizes_once(size):
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor(vae_scale_factor=16)
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit")
    source = noise_image(*size)
    width, height, _ = pipeline.calculate_dimensions(256 * 256, size[0] / size[1])
    resized = processor.resize(source, height, width)
    vae_BCHW = processor.preprocess(resized, height, width).numpy()

    found = prepare(source, Areas(vae_area=256 * 256, condition_area=None))
    np.testing.assert_array_equal(np.asarray(found.vision), np.asarray(resized))
    np.testing.assert_allclose(found.vae / 127.5 - 1, vae_BCHW[0].transpose(1, 2, 0), atol=1e-6)


def test_resize_is_lanczos_and_takes_width_first():
    source = noise_image(31, 17)
    resized = resize(source, 64, 32)
    assert resized.size == (64, 32)
    np.testing.assert_array_equal(
        to_uint8_HWC(resized), np.asarray(source.resize((64, 32), resample=Image.Resampling.LANCZOS))
    )
