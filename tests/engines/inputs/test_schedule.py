"""schedule.py against the pipeline's and the scheduler's own code in diffusers."""

import math

import numpy as np
import pytest

from qie.compiler.checkpoint.scheduler import parse_scheduler
from qie.engines.bundle.specs import SchedulerSpec
from qie.engines.errors import BundleError, CheckpointError, RequestError
from qie.engines.inputs.schedule import sigmas

PUBLISHED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.35.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
LIGHTNING = PUBLISHED | {"base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}


def reference_sigmas(config, steps, noise_tokens):
    pytest.importorskip("torch")
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    mu = pipeline.calculate_shift(
        noise_tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    pipeline.retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.numpy()


@pytest.mark.parametrize("steps", [2, 4, 8, 28, 40, 50, 333])
@pytest.mark.parametrize("noise_tokens", [12, 256, 4096, 4114, 8192, 16384])
@pytest.mark.parametrize(
    "config",
    [
        PUBLISHED,
        LIGHTNING,
        PUBLISHED | {"shift_terminal": 0},
        PUBLISHED | {"time_shift_type": "linear"},
        PUBLISHED | {"use_dynamic_shifting": False, "shift": 3.0},
        PUBLISHED | {"use_dynamic_shifting": False, "shift": 1.15, "shift_terminal": None},
        {"use_dynamic_shifting": True},
        {},
    ],
    ids=["published", "lightning", "terminal-0", "linear", "static", "static-plain", "dynamic-defaults", "defaults"],
)
def test_sigmas_equal_diffusers_to_the_last_bit(config, noise_tokens, steps):
    ours = sigmas(parse_scheduler(config), steps=steps, noise_tokens=noise_tokens)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference_sigmas(config, steps, noise_tokens))


def test_known_values_of_a_square_megapixel():
    spec = parse_scheduler(PUBLISHED)
    found = sigmas(spec, steps=50, noise_tokens=4096)
    assert found.shape == (51,)
    assert found[0] == 1
    assert found[-2] == pytest.approx(0.02, abs=1e-7)
    assert found[-1] == 0
    assert (np.diff(found) < 0).all()


def test_more_noise_tokens_shift_more():
    spec = parse_scheduler(PUBLISHED)
    assert sigmas(spec, steps=8, noise_tokens=8192)[4] > sigmas(spec, steps=8, noise_tokens=1024)[4]


def test_lightning_shifts_alike_at_every_size():
    spec = parse_scheduler(LIGHTNING)
    at = [sigmas(spec, steps=4, noise_tokens=n) for n in (256, 4096)]
    np.testing.assert_allclose(at[0], [1, 9 / 10, 3 / 4, 1 / 2, 0], rtol=1e-6)
    np.testing.assert_array_equal(*at)


@pytest.mark.parametrize("config", [PUBLISHED, LIGHTNING])
def test_one_step_runs_from_noise_to_image(config):
    np.testing.assert_array_equal(sigmas(parse_scheduler(config), steps=1, noise_tokens=4096), [1, 0])


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(RequestError, match=f"steps is {steps}, expected at least 1"):
        sigmas(SchedulerSpec(), steps=steps, noise_tokens=4096)


def test_defaults_are_those_of_diffusers():
    config = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler().config
    spec = parse_scheduler({})
    for name in SchedulerSpec.__dataclass_fields__:
        assert getattr(spec, name) == config[name]


@pytest.mark.parametrize(
    "option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"]
)
def test_unsupported_options_are_named(option):
    with pytest.raises(CheckpointError, match=option):
        parse_scheduler(PUBLISHED | {option: True})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("time_shift_type", "cubic"),
        ("base_shift", None),
        ("max_shift", "0.9"),
        ("use_dynamic_shifting", "yes"),
        ("num_train_timesteps", True),
        ("num_train_timesteps", 0),
        ("shift", float("nan")),
        ("base_shift", -1e9),
        ("max_image_seq_len", 256),
    ],
)
def test_values_of_the_wrong_kind_are_named(option, value):
    with pytest.raises(CheckpointError, match=option):
        parse_scheduler(PUBLISHED | {option: value})


def test_a_shift_that_leaves_no_schedule():
    spec = parse_scheduler(PUBLISHED | {"base_shift": 0.5, "max_shift": 99, "max_image_seq_len": 257})
    with pytest.raises(BundleError, match="4096 tokens.* leaves no schedule; use the scheduler folder"):
        sigmas(spec, steps=4, noise_tokens=4096)


def test_another_scheduler_is_refused():
    with pytest.raises(CheckpointError, match="UniPCMultistepScheduler"):
        parse_scheduler({"_class_name": "UniPCMultistepScheduler"})
