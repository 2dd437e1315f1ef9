"""vision.py against transformers' image processor and vision utilities."""

import dataclasses
import itertools

import numpy as np
import pytest

from qie.compiler.checkpoint.processor import parse_processor
from qie.engines.bundle.specs import VisionSpec
from qie.engines.errors import CheckpointError, ImageError
from qie.engines.inputs.vision import smart_resize, vision_inputs
from tests.support.images import noise_image

TOWER = {"patch_size": 14, "spatial_merge_size": 2, "window_size": 112, "hidden_size": 1280, "num_heads": 16}
SMALL_TOWER = {
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "window_size": 24,
    "hidden_size": 48,
    "num_heads": 4,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0},
}
SMALL_PROCESSOR = {
    "patch_size": 4,
    "temporal_patch_size": 1,
    "min_pixels": 16 * 16,
    "max_pixels": 64 * 64,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.25, 0.3],
}
MODELS = {"published": (TOWER, {"max_pixels": 12845056}), "small": (SMALL_TOWER, SMALL_PROCESSOR)}
SIZES = [
    [(384, 384)],
    [(113, 57)],
    [(28, 28)],
    [(300, 200), (200, 300), (448, 112)],
    [(1, 150), (224, 224)],
    [(640, 61), (30, 31), (111, 113), (5, 5)],
]  # (width, height) of each image of an edit


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.mark.parametrize("sizes", SIZES)
def test_inputs_equal_transformers(model, sizes):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("transformers.vision_utils")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    tower, preprocessor = model
    config = transformers.Qwen2_5_VLConfig(vision_config=dict(tower)).vision_config
    spec = parse_processor(tower, preprocessor)
    images = [noise_image(*size, seed) for seed, size in enumerate(sizes)]
    found = vision_inputs(images, spec)

    processed = processing.Qwen2VLImageProcessorPil(**preprocessor)(images, return_tensors="pt")
    grids = processed["image_grid_thw"]
    assert found.grids == tuple(map(tuple, grids.tolist()))

    unit = spec.merge_size**2
    index, window_bounds = utils.get_vision_window_index(grids, spec.merge_size, spec.window_size, spec.patch_size)
    in_window_order = lambda rows: rows.reshape(len(index), unit, -1)[index].reshape(len(index) * unit, -1)  # noqa: E731
    np.testing.assert_array_equal(found.patches, in_window_order(processed["pixel_values"]).numpy())
    assert found.patches.dtype == np.float32
    np.testing.assert_array_equal(found.raster_index, torch.argsort(index).numpy())

    image_bounds = utils.get_vision_cu_seqlens(grids)
    for ids, bounds in ((found.window_ids, window_bounds), (found.image_ids, image_bounds)):
        assert ids.dtype == np.int64
        expected = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds.numpy()))
        np.testing.assert_array_equal(ids[:, None] == ids, expected[:, None] == expected)

    positions = utils.get_vision_position_ids(grids, spec.merge_size)
    cos, sin = modeling.Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(1), positions)
    half = spec.head_dim // 2
    assert cos.shape[1] == spec.head_dim
    assert torch.equal(cos[:, :half], cos[:, half:])
    np.testing.assert_allclose(found.rotary_cos, in_window_order(cos)[:, :half].numpy(), atol=2e-7, rtol=0)
    np.testing.assert_allclose(found.rotary_sin, in_window_order(sin)[:, :half].numpy(), atol=2e-7, rtol=0)
    assert found.rotary_cos.dtype == found.rotary_sin.dtype == np.float32


def test_windows_are_squares_of_merged_cells():
    spec = parse_processor(TOWER, {})
    found = vision_inputs([noise_image(140, 140), noise_image(56, 56)], spec)  # 5 x 5 and 2 x 2 cells, windows of 4 x 4
    assert np.unique(found.window_ids, return_counts=True)[1].tolist() == [16 * 4, 4 * 4, 4 * 4, 4, 4 * 4]
    assert np.unique(found.image_ids, return_counts=True)[1].tolist() == [100, 16]


def test_raster_index_brings_cells_back():
    spec = dataclasses.replace(parse_processor(TOWER, {}), min_pixels=1)
    found = vision_inputs([noise_image(150, 310), noise_image(290, 90)], spec)
    cells = found.patches.reshape(len(found.raster_index), -1)[found.raster_index]
    alone = []
    for size, seed in (((150, 310), 0), ((290, 90), 0)):
        one = vision_inputs([noise_image(*size, seed)], dataclasses.replace(spec, window_size=14 * 2 * 100))
        alone.append(one.patches.reshape(len(one.raster_index), -1))  # one window: raster order
    np.testing.assert_array_equal(cells, np.concatenate(alone))


@pytest.mark.parametrize(
    ("factor", "min_pixels", "max_pixels"), [(28, 3136, 12845056), (28, 56 * 56, 28 * 28 * 1280), (8, 256, 4096)]
)
def test_smart_resize_equals_transformers(factor, min_pixels, max_pixels):
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    for height, width in itertools.product([1, 13, 28, 42, 70, 384, 1111, 6000], repeat=2):
        if max(height, width) <= 200 * min(height, width):
            expected = processing.smart_resize(height, width, factor, min_pixels, max_pixels)
            found = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
            assert found == expected


def test_too_narrow_an_image_is_refused():
    spec = parse_processor(TOWER, {})
    vision_inputs([noise_image(200, 1)], spec)
    with pytest.raises(ImageError, match=r"201 x 1 pixels.*200"):
        vision_inputs([noise_image(201, 1)], spec)


def test_spec_takes_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    config = transformers.Qwen2_5_VLConfig().vision_config
    processor = processing.Qwen2VLImageProcessorPil()
    spec = parse_processor({}, {})
    assert spec == VisionSpec(
        patch_size=config.patch_size,
        merge_size=config.spatial_merge_size,
        temporal_patch_size=config.temporal_patch_size,
        window_size=config.window_size,
        head_dim=config.hidden_size // config.num_heads,
        rope_theta=config.rope_parameters["rope_theta"],
        min_pixels=processor.size["shortest_edge"],
        max_pixels=processor.size["longest_edge"],
        image_mean=tuple(processor.image_mean),
        image_std=tuple(processor.image_std),
    )
    assert parse_processor(config.to_dict(), processor.to_dict()) == spec


@pytest.mark.parametrize(
    ("preprocessor", "limits"),
    [
        ({"min_pixels": 100, "max_pixels": 900}, (100, 900)),
        ({"size": {"shortest_edge": 200, "longest_edge": 800}}, (200, 800)),
        ({"size": {"shortest_edge": 200, "longest_edge": 800}, "max_pixels": 900}, (200, 900)),
        ({"size": None, "min_pixels": None}, (3136, 1003520)),
    ],
)
def test_limits_stand_in_either_place(preprocessor, limits):
    spec = parse_processor({}, preprocessor)
    assert (spec.min_pixels, spec.max_pixels) == limits


@pytest.mark.parametrize(
    ("tower", "preprocessor", "option"),
    [
        ({"patch_size": 16}, {}, "patch_size"),
        ({"spatial_merge_size": 1}, {"merge_size": 2}, "merge_size"),
        ({}, {"temporal_patch_size": 1}, "temporal_patch_size"),
        ({}, {"do_normalize": False}, "do_normalize"),
        ({}, {"resample": 2}, "resample"),
        ({}, {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({}, {"image_mean": 0.5}, "image_mean"),
        ({}, {"image_mean": [0.5, 0.5]}, "image_mean"),
        ({}, {"image_std": [0.5, 0.5, "0.5"]}, "image_std"),
        ({}, {"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({}, {"size": 224}, "size"),
        ({}, {"min_pixels": 4096, "max_pixels": 1024}, "min_pixels is 4096, above max_pixels"),
        ({}, {"max_pixels": "many"}, "max_pixels is 'many'"),
    ],
)
def test_a_processor_that_does_not_fit_is_named(tower, preprocessor, option):
    with pytest.raises(CheckpointError, match=option):
        parse_processor(tower, preprocessor)
