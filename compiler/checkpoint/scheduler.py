"""The scheduler of a checkpoint: its config, as the options that decide an edit's sigmas."""

from collections.abc import Mapping
from typing import Any

from qie.engines.bundle.specs import LARGEST_SHIFT, SchedulerSpec
from qie.engines.errors import CheckpointError
from qie.engines.records import brief, from_plain, is_number

__all__ = ["parse_scheduler"]

_CLASS = "FlowMatchEulerDiscreteScheduler"
_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def parse_scheduler(config: Mapping[str, Any]) -> SchedulerSpec:
    """The spec in a parsed scheduler_config.json; absent options take the defaults.

    Raises:
        CheckpointError: the scheduler is of another class, an option changes the schedule in a way that qie does not
            follow, or a value is of the wrong kind.
    """
    if config.get("_class_name", _CLASS) != _CLASS:
        raise CheckpointError(
            f"scheduler_config.json is for {brief(config['_class_name'])}, expected {_CLASS}; take the scheduler "
            "folder of the published checkpoint"
        )
    for option in _UNSUPPORTED:
        if config.get(option):
            raise CheckpointError(
                f"scheduler_config.json sets {option}, which qie does not support; set it to false or remove it"
            )
    options = {name: config[name] for name in SchedulerSpec.__dataclass_fields__ if name in config}
    for name, value in options.items():
        if not _is_valid(name, value):
            raise CheckpointError(
                f"scheduler_config.json: {name} = {brief(value)}, which is not a value of that option; take the "
                "scheduler folder of the published checkpoint"
            )
    try:
        spec = from_plain(SchedulerSpec, options)
    except ValueError as problem:
        raise CheckpointError(
            f"scheduler_config.json: {problem}; take the scheduler folder of the published checkpoint"
        ) from None
    if not spec.base_image_seq_len < spec.max_image_seq_len:
        raise CheckpointError(
            f"scheduler_config.json: base_image_seq_len = {spec.base_image_seq_len}, expected less than "
            f"max_image_seq_len = {spec.max_image_seq_len}; take the scheduler folder of the published checkpoint"
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
        return abs(value) <= LARGEST_SHIFT
    return value > 0 or name == "shift_terminal"
