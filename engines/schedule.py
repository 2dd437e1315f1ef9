"""The noise schedule of an edit: sigmas for a number of steps and a number of noise tokens.

The arithmetic follows diffusers: the `QwenImageEdit*Pipeline.__call__` functions make linear sigmas and mu in float64,
`FlowMatchEulerDiscreteScheduler.set_timesteps` shifts and stretches them in float32. Results are equal to the last bit.

Shape suffixes: S steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qie.engines.errors import CheckpointError, EditError
from qie.engines.records import is_number

__all__ = ["SchedulerSpec", "sigmas"]

_CLASS = "FlowMatchEulerDiscreteScheduler"
_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
_LARGEST_SHIFT = 100
"""Published schedulers shift by 0.5 to 1.15; by this much, every sigma is 1 to the last bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSpec:
    """The options of a checkpoint's scheduler_config.json that decide its sigmas.

    The defaults are those of diffusers scheduling_flow_match_euler_discrete.py, `FlowMatchEulerDiscreteScheduler`; the
    pipelines fall back to the same four numbers for mu.

    num_train_timesteps: timesteps of training; a step's timestep is sigma * num_train_timesteps
    shift: factor of the static shift, used where use_dynamic_shifting is false
    use_dynamic_shifting: shift by mu, which is linear in the number of noise tokens
    base_shift, max_shift: mu at base_image_seq_len and at max_image_seq_len tokens
    shift_terminal: sigma that the last step is stretched to; None or 0 leaves the schedule as it is
    time_shift_type: formula of the dynamic shift
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "SchedulerSpec":
        """The spec in a parsed scheduler_config.json; absent options take the defaults.

        Raises CheckpointError for another scheduler class, for an option that changes the schedule in a way that qie
        does not follow, and for a value of the wrong kind.
        """
        if config.get("_class_name", _CLASS) != _CLASS:
            raise CheckpointError(
                f"scheduler_config.json is for {config['_class_name']}, but an edit's steps are those of {_CLASS}: "
                "take the scheduler folder of the published checkpoint."
            )
        for option in _UNSUPPORTED:
            if config.get(option):
                raise CheckpointError(
                    f"scheduler_config.json sets {option}, which qie does not support: set it to false or remove it."
                )
        known = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        for name, value in known.items():
            if not _is_valid(name, value):
                raise CheckpointError(
                    f"scheduler_config.json holds {name} = {value!r}, which is not a value of that option: "
                    "take the scheduler folder of the published checkpoint."
                )
        spec = cls(**known)
        if not spec.base_image_seq_len < spec.max_image_seq_len:
            raise CheckpointError(
                f"scheduler_config.json holds base_image_seq_len = {spec.base_image_seq_len}, which is not below "
                f"max_image_seq_len = {spec.max_image_seq_len}: take the scheduler folder of the published checkpoint."
            )
        return spec


def _is_valid(name: str, value: Any) -> bool:
    """Whether a value of scheduler_config.json is of its option's kind."""
    if name == "time_shift_type":
        return value in ("exponential", "linear")
    if name == "use_dynamic_shifting":
        return isinstance(value, bool)
    if name == "shift_terminal" and value is None:
        return True
    if not is_number(value):
        return False
    if name in ("base_shift", "max_shift"):
        return abs(value) <= _LARGEST_SHIFT
    return value > 0 or name == "shift_terminal"


def sigmas(spec: SchedulerSpec, *, steps: int, noise_tokens: int) -> NDArray[np.float32]:
    """Sigmas of a schedule: float32 [steps + 1], from 1 downwards, the last one 0.

    steps: number of denoising steps, at least 1
    noise_tokens: tokens of the picture being made, (height / 16) * (width / 16); reference images do not count

    A single step cannot both start at 1 and end at `shift_terminal` (diffusers gives NaN): it runs from 1 to 0.
    Raises EditError when steps is below 1, or when a damaged scheduler leaves no schedule.
    """
    if steps < 1:
        raise EditError(f"An edit of {steps} steps was asked for, but it needs at least 1: raise the number of steps.")
    sigma_S = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    one = np.float32(1)
    if spec.use_dynamic_shifting:
        mu = _mu(spec, noise_tokens)
        if mu > _LARGEST_SHIFT:
            raise EditError(
                f"The checkpoint's scheduler shifts a picture of {noise_tokens} tokens by {mu:g}, which leaves no "
                "schedule: take the scheduler folder of the published checkpoint."
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
    """The line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift) (`calculate_shift`)."""
    slope = (spec.max_shift - spec.base_shift) / (spec.max_image_seq_len - spec.base_image_seq_len)
    return noise_tokens * slope + (spec.base_shift - slope * spec.base_image_seq_len)
