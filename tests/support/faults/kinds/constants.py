"""Constants of the model in the manifest that are wrong, under a seal that is right."""

from pathlib import Path
from typing import Any

from tests.support.faults.fault import Fault
from tests.support.faults.sealing import assign, reseal

__all__ = ["FAULTS"]


def exchange_modulation(bundle: Path) -> None:
    """Two tensors of the modulation weights of one shape in each other's place, in the manifest."""

    def change(data: dict[str, Any]) -> None:
        tensors = {tensor["name"]: tensor for tensor in data["model"]["modulation"]["tensors"]}
        one, other = (tensors[f"transformer_blocks.2.{module}.1.weight"] for module in ("img_mod", "txt_mod"))
        one["offset"], other["offset"] = other["offset"], one["offset"]

    reseal(bundle, change)


FAULTS = {
    "shift of the schedule": Fault(
        how="`max_shift` of the scheduler is 1.15, the default, in place of 0.9",
        breaks=assign(model__scheduler__max_shift=1.15),
    ),
    "end of the schedule": Fault(
        how="`shift_terminal` is missing",
        breaks=assign(model__scheduler__shift_terminal=None),
    ),
    "formula of the shift": Fault(
        how="the shift is linear in place of exponential",
        breaks=assign(model__scheduler__time_shift_type="linear"),
    ),
    "rotary wavelengths": Fault(
        how="`theta` of the transformer's rotary embedding is 100,000",
        breaks=assign(model__rotary__theta=100000.0),
    ),
    "rotary channels": Fault(
        how="`axes_dims` has the channels of the frame last",
        breaks=assign(model__rotary__axes_dims=[28, 28, 8]),
    ),
    "image token": Fault(
        how="the id of the image token is that of the video token",
        breaks=assign(model__prompt__image_token_id=795),
    ),
    "template of the prompt": Fault(
        how="the template is that of the first generation",
        breaks=assign(model__prompt__pipeline="edit"),
    ),
    "mean of the vision tower": Fault(
        how="the means of the channels are in reverse order",
        breaks=assign(model__vision__image_mean=[0.40821073, 0.4578275, 0.48145466]),
    ),
    "deviation of the vision tower": Fault(
        how="the deviations of all channels are 0.5",
        breaks=assign(model__vision__image_std=[0.5, 0.5, 0.5]),
    ),
    "windows of the vision tower": Fault(
        how="a window of the vision tower is twice as wide",
        breaks=assign(model__vision__window_size=224),
    ),
    "rotary wavelengths of the vision tower": Fault(
        how="`rope_theta` of the vision tower is 1,000,000",
        breaks=assign(model__vision__rope_theta=1e6),
    ),
    "area of reference images": Fault(
        how="reference images have half the area",
        breaks=assign(model__areas__vae_area=8192),
    ),
    "area of the vision tower's images": Fault(
        how="the vision tower takes the copy for the VAE",
        breaks=assign(model__areas__condition_area=None),
    ),
    "modulation weights exchanged": Fault(
        how="the modulation of image and text of block 2 are in each other's place, the tables are right",
        breaks=exchange_modulation,
    ),
    "dtype of the noise": Fault(
        how="a bundle draws its noise in bfloat16, the recipe says float32",
        level="structure",
        breaks=assign(defaults__noise="bfloat16"),
    ),
    "limits of another recipe": Fault(
        how="a bundle accepts smaller images than its recipe says",
        level="structure",
        breaks=assign(limits__min_side=16),
    ),
}
