"""The noise schedule of an edit: sigmas for a number of steps and a number of noise tokens.

The arithmetic follows diffusers: ``QwenImageEdit*Pipeline.__call__`` computes linear sigmas and mu in float64,
``FlowMatchEulerDiscreteScheduler.set_timesteps`` shifts and stretches them in float32. Results are bit-equal.

Shape suffixes: S steps.
"""

import math

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.specs import LARGEST_SHIFT, SchedulerSpec
from qie.engines.errors import BundleError, RequestError

__all__ = ["sigmas"]


def sigmas(spec: SchedulerSpec, *, steps: int, noise_tokens: int) -> NDArray[np.float32]:
    """Sigmas of a schedule: float32 [steps + 1], from 1 downwards, the last one 0.

    A single step cannot both start at 1 and end at ``shift_terminal`` (diffusers gives NaN): it runs from 1 to 0.

    Args:
        spec: options of the checkpoint's scheduler.
        steps: number of denoising steps, at least 1.
        noise_tokens: tokens of the image being generated, (height / 16) * (width / 16), without reference images.

    Raises:
        RequestError: ``steps`` is below 1.
        BundleError: the scheduler's options leave no schedule.
    """
    if steps < 1:
        raise RequestError(f"the number of steps is {steps}, expected at least 1; use more steps", option="steps")
    sigma_S = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    one = np.float32(1)
    if spec.use_dynamic_shifting:
        mu = _mu(spec, noise_tokens)
        if mu > LARGEST_SHIFT:
            raise BundleError(
                f"the checkpoint's scheduler shifts an image of {noise_tokens} tokens by {mu:g}, which leaves no "
                "schedule; use the scheduler folder of the published checkpoint"
            )
        weight = np.float32(math.exp(mu) if spec.time_shift_type == "exponential" else mu)
        sigma_S = weight / (weight + (one / sigma_S - one))
    else:
        sigma_S = np.float32(spec.shift) * sigma_S / (one + np.float32(spec.shift - 1) * sigma_S)
    if spec.shift_terminal and steps > 1:
        signal_S = one - sigma_S
        sigma_S = one - signal_S / (signal_S[-1] / np.float32(1 - spec.shift_terminal))
    return np.append(sigma_S, np.float32(0))


def _mu(spec: SchedulerSpec, noise_tokens: int) -> float:
    """The line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) (``calculate_shift``)."""
    slope = (spec.max_shift - spec.base_shift) / (spec.max_image_seq_len - spec.base_image_seq_len)
    return noise_tokens * slope + (spec.base_shift - slope * spec.base_image_seq_len)
