"""The pocket model's golden cases: ``python -m pocket.cases CHECKPOINT`` writes cases.toml and its images.

The images are of photos that training never saw, and every target is the exact answer. Record them afterwards:
``qie golden pocket -o recipes/pocket/golden.safetensors``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.data.edits import Instruction, exact_result, instruction_text
from pocket.data.images import load_photo
from pocket.data.operations import Rgb, Source
from qie.compiler.recipe.toml import inline
from qie.compiler.validation.golden.cases import CASES_FILE

__all__ = ["CASES", "PocketCase", "write_cases"]

FOLDER = "cases"
"""The folder of the images, beside the TOML file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PocketCase:
    """One case.

    Attributes:
        name: of the case.
        photos: names of the photos.
        input: width and height of the input images in pixels.
        result: width and height of the result.
        instruction: the edit.
        settings: the other keys of the case.
    """

    name: str
    photos: tuple[str, ...]
    input: tuple[int, int]
    result: tuple[int, int]
    instruction: Instruction
    settings: dict[str, float]


CASES = (
    PocketCase(
        name="wide",
        photos=("chelsea",),
        input=(200, 120),
        result=(160, 96),
        instruction=Instruction("tint", (("color", "purple"),)),
        settings={"seed": 1, "record": 4},
    ),
    PocketCase(
        name="tall with guidance",
        photos=("coffee",),
        input=(96, 160),
        result=(96, 160),
        instruction=Instruction("invert"),
        settings={"seed": 2, "steps": 8, "guidance": 1.5, "record": 3},
    ),
    PocketCase(
        name="two images",
        photos=("coffee", "rocket"),
        input=(128, 128),
        result=(128, 128),
        instruction=Instruction("colours of picture 2"),
        settings={"seed": 3, "record": 2},
    ),
    PocketCase(
        name="five in a row",
        photos=("rocket",),
        input=(128, 128),
        result=(128, 128),
        instruction=Instruction("mirror"),
        settings={"seed": 4, "record": 2, "chain": 5},
    ),
)
"""In the order of the file; the modules of the first one are sampled."""


def write_cases(checkpoint: Path) -> None:
    """Write the cases and their images into the folder of the checkpoint."""
    (checkpoint / FOLDER).mkdir(exist_ok=True)
    lines = ["# Written by `python -m pocket.cases`; docs/validation.md describes the keys."]
    for case in CASES:
        stem = case.name.replace(" ", "-")
        images = [middle(load_photo(photo), *case.input) for photo in case.photos]
        target = exact_result(case.instruction, *(Source(image=resized(image, *case.result)) for image in images))
        names = [f"{stem}.png", f"{stem}-2.png"][: len(images)]
        for name, image in zip((*names, f"{stem}-target.png"), (*images, target), strict=True):
            Image.fromarray(image).save(checkpoint / FOLDER / name, optimize=True)
        lines += ["", "[[cases]]", *table(case, [f"{FOLDER}/{name}" for name in names], f"{FOLDER}/{stem}-target.png")]
    (checkpoint / CASES_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(case: PocketCase, images: Sequence[str], target: str) -> list[str]:
    """The lines of a case."""
    keys = {"name": case.name, "images": list(images), "instruction": instruction_text(case.instruction)}
    return [f"{key} = {inline(value)}" for key, value in (keys | case.settings | {"target": target}).items()]


def middle(photo: Rgb, width: int, height: int) -> Rgb:
    """The largest part in the middle of a photo with the aspect of ``width`` x ``height``, resized to that."""
    rows, columns, _ = photo.shape
    wide, tall = min(columns, rows * width // height), min(rows, columns * height // width)
    left, top = (columns - wide) // 2, (rows - tall) // 2
    return resized(photo[top : top + tall, left : left + wide], width, height)


def resized(image: Rgb, width: int, height: int) -> Rgb:
    """An image at another size, as the pipeline resizes it."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    options = parser.parse_args()
    write_cases(options.checkpoint)
    print(f"{options.checkpoint / CASES_FILE}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
