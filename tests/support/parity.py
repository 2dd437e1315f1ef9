"""What the parity tests share: small checkpoints of every generation, built and loaded beside the reference."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.metrics.error import psnr_db
from qie.compiler.synthetic.architecture import ARCHITECTURES, Architecture
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.compiler.validation.reference import Reference, load_reference
from qie.engines.bundle.bundle import Bundle
from qie.engines.editing.editor import Editor
from tests.support.bundles import build
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image

TINY = ARCHITECTURES["tiny"]

CASES: dict[str, Architecture] = {
    "edit": replace(TINY, pipeline="edit", zero_cond_t=False, text_names="old"),
    "2509": replace(TINY, zero_cond_t=False),
    "2511": TINY,
    "2511-wide": replace(
        TINY,
        num_layers=3,
        num_attention_heads=3,
        attention_head_dim=16,
        axes_dims_rope=(4, 4, 8),
        text_hidden_size=96,
        text_layers=3,
        text_heads=4,
        text_kv_heads=2,
        text_intermediate_size=80,
        text_mrope_section=(2, 4, 6),
        vision_depth=3,
        vision_hidden_size=48,
        vision_heads=3,
        vision_fullatt_block_indexes=(0, 2),
        vae_base_dim=4,
        vae_num_res_blocks=2,
    ),
    "2509-one-head": replace(
        TINY,
        zero_cond_t=False,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
        text_names="old",
        condition_area=168 * 168,
        vae_area=96 * 96,
    ),
}
"""Checkpoints of the three generations (Edit, 2509, 2511) in several widths, head counts and splits of the axes."""

SHAPES = ((150, 90), (77, 170), (128, 128))
"""Sizes in pixels of the images that edits are made from: landscape, a narrow portrait, square."""


@dataclass(frozen=True)
class Side:
    """A checkpoint with qie's bundle of it on one side and diffusers on the other."""

    folder: Path
    bundle: Bundle

    @cached_property
    def reference(self) -> Reference:
        return load_reference(self.folder)

    @cached_property
    def editor(self) -> Editor:
        return uncached_editor(self.bundle)


def make_side(name: str, folder: Path) -> Side:
    """Write the checkpoint ``name`` of CASES and build it for the CPU."""
    checkpoint = write_checkpoint(folder / name, CASES[name], seed=7)
    return Side(checkpoint, build(checkpoint, folder / f"{name}-bundle"))


def images(count: int) -> list[Image.Image]:
    return [smooth_image(*SHAPES[i], seed=i, grain=12) for i in range(count)]


def psnr(image: Image.Image, expected: NDArray[np.uint8]) -> float:
    """PSNR of an image of qie against one of diffusers, in dB; infinite for equal images."""
    return psnr_db(np.asarray(image), expected)


SideOf = Callable[[str], Side]


def counts(name: str) -> range:
    """Numbers of reference images that the case's pipeline takes."""
    return range(1, 2) if CASES[name].pipeline == "edit" else range(1, 4)


MANY = [(name, count) for name in CASES for count in counts(name)]
