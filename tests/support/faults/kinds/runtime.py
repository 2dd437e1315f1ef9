"""Code of the runtime that is wrong while a sound bundle runs."""

from tests.support.faults.code import Change
from tests.support.faults.fault import Fault

__all__ = ["FAULTS"]


def inputs(module: str, how: str, old: str, new: str, *more: str, cases: tuple[str, ...] = ()) -> Fault:
    """A fault of what the host computes, which is compared with the reference bit by bit."""
    return Fault(
        how=how,
        runs=Change(module=f"engines.inputs.{module}", old=old, new=new),
    )


def rotary(how: str, old: str, new: str, cases: tuple[str, ...] = ()) -> Fault:
    """A fault of the transformer's rotary tables."""
    return Fault(
        how=how,
        runs=Change(module="engines.inputs.rotary", old=old, new=new),
    )


FAULTS = {
    "frame of references": rotary(
        "every image has the frame position 0", "_image_positions(i, *grid)", "_image_positions(0, *grid)"
    ),
    "start of the text": rotary(
        "the text starts one position later",
        "np.arange(text_start, text_start + text_tokens)",
        "np.arange(text_start + 1, text_start + 1 + text_tokens)",
    ),
    "centered positions": rotary(
        "rows are numbered from 0 in place of around 0",
        "np.arange(height) - (height - height // 2)",
        "np.arange(height)",
    ),
    "center of an odd side": rotary(
        "columns are centered one position to the left",
        "np.arange(width) - (width - width // 2)",
        "np.arange(width) - (width - width // 2) - 1",
    ),
    "rows and columns": rotary(
        "rows and columns of positions are in each other's place",
        "rows_HW.ravel(), columns_HW.ravel()], axis=1)",
        "columns_HW.ravel(), rows_HW.ravel()], axis=1)",
    ),
    "packing of noise": inputs(
        "rotary",
        "a token of noise has the 2 x 2 positions first",
        "transpose(0, 2, 4, 1, 3, 5)",
        "transpose(0, 2, 4, 3, 5, 1)",
    ),
    "noise of another seed": inputs(
        "noise", "the seed is one larger", "RandomState(seed & 0xFFFFFFFF)", "RandomState((seed + 1) & 0xFFFFFFFF)"
    ),
    "sigmas that end elsewhere": inputs(
        "schedule",
        "the linear sigmas end at 0 in place of 1 / steps",
        "np.linspace(1.0, 1.0 / steps, steps)",
        "np.linspace(1.0, 1e-3, steps)",
    ),
    "resampling of references": inputs(
        "prepare",
        "reference images are resized by bicubic interpolation",
        "resample=Image.Resampling.LANCZOS",
        "resample=Image.Resampling.BICUBIC",
    ),
    "resampling of the vision tower's images": inputs(
        "vision",
        "images of the vision tower are resized bilinearly",
        "resample=Image.Resampling.BICUBIC",
        "resample=Image.Resampling.BILINEAR",
    ),
    "number of the first image": inputs(
        "prompt",
        "the prompt numbers its images from 0",
        "enumerate(grids, start=1)",
        "enumerate(grids, start=0)",
    ),
    "tokens of the prefix": Fault(
        how="63 tokens of the prefix are left out, so that the last token has no place",
        runs=Change(module="engines.editing.stages", old="length - PREFIX_TOKENS", new="length - PREFIX_TOKENS + 1"),
    ),
    "positions after an image": inputs(
        "prompt",
        "the text behind an image starts after its height in place of its longer side",
        "position += max(size[1:])",
        "position += size[1]",
    ),
    "place of image embeddings": Fault(
        how="the image embeddings are one token further",
        runs=Change(
            module="engines.inputs.prompt",
            old="np.arange(is_image_S.sum())",
            new="np.maximum(np.arange(is_image_S.sum()) - 1, 0)",
        ),
    ),
    "columns of windows": Fault(
        how="the windows of the vision tower are one cell further",
        runs=Change(
            module="engines.inputs.vision",
            old="np.arange(columns) // side)",
            new="(np.arange(columns) + 1) // side)",
        ),
    ),
    "order of image embeddings": Fault(
        how="the image embeddings stay in window order",
        runs=Change(
            module="engines.inputs.vision",
            old="raster_index=np.argsort(window_index_M)",
            new="raster_index=window_index_M",
        ),
    ),
    "positions of patches": Fault(
        how="rows and columns of patches are in each other's place",
        runs=Change(
            module="engines.inputs.vision",
            old="np.concatenate(positions)[window_index_P]",
            new="np.concatenate(positions)[window_index_P][:, ::-1]",
        ),
    ),
    "pixels of a patch": inputs(
        "vision",
        "a patch has its columns before its rows",
        "cells.transpose(0, 3, 1, 4, 6, 2, 5)",
        "cells.transpose(0, 3, 1, 4, 6, 5, 2)",
    ),
    "step of the next sigma": Fault(
        how="every step takes the size of the next",
        runs=Change(
            module="engines.editing.denoise",
            old="np.diff(schedule).astype(np.float32)",
            new="np.roll(np.diff(schedule), -1).astype(np.float32)",
        ),
    ),
    "guidance scale": Fault(
        how="the guidance scale is 1 larger",
        runs=Change(
            module="engines.inputs.feeds",
            old="np.array(guidance_B, np.float32)",
            new="np.array([scale + (scale != 1) for scale in guidance_B], np.float32)",
        ),
    ),
    "negative pass with the instruction": Fault(
        how="the negative pass reads the instruction",
        runs=Change(
            module="engines.editing.denoise",
            old="np.stack(negatives)",
            new="np.stack([row.prompt for row in rows])",
        ),
    ),
    "formula of the timestep": Fault(
        how="sine and cosine of the timestep's embedding are in each other's place",
        runs=Change(
            module="engines.inputs.modulation",
            old="[np.cos(angles), np.sin(angles)]",
            new="[np.sin(angles), np.cos(angles)]",
        ),
    ),
    "latents upside down": Fault(
        how="the latents are decoded from the last row to the first",
        runs=Change(
            module="engines.inputs.feeds",
            old='{"latents": latents_hwC[None]}',
            new='{"latents": latents_hwC[::-1][None]}',
        ),
    ),
}
