"""The cases of a golden file: a small TOML file beside its images, the checkpoint's own, or those that qie ships."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from qie.compiler.checkpoint.model import Model
from qie.compiler.recipe.schema import AREA_SCALE_MAX, Schedule
from qie.compiler.recipe.toml import Matching, Within, build, flatten
from qie.engines.bundle.specs import DEFAULT_NEGATIVE, SIDE_MULTIPLE
from qie.engines.errors import GoldenError, ImageError, RecipeError
from qie.engines.files import read_regular
from qie.engines.inputs.image import MAX_ASPECT, MAX_PIXELS, load_image
from qie.engines.inputs.prepare import output_size

__all__ = ["CASES_FILE", "PUBLISHED", "Case", "CaseTable", "find_cases", "read_cases", "shipped_cases", "waves"]

CASES_FILE = "cases.toml"
"""The name under which a checkpoint's folder may hold its cases."""

PUBLISHED = Schedule(steps=40, guidance=4.0)
"""The steps and the guidance of a case that says none, for a model without a schedule of its own."""

_CASES_MAX, _CHAIN_MAX, _FILE_MAX = 64, 32, 1 << 20

_Text = Annotated[str, Matching(pattern=r"(?s:.{1,2000})", example="make it night")]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseTable:
    """One case as a TOML file has it.

    Attributes:
        name: unique in the file.
        images: paths of the input images, relative to the file.
        instruction: of the edit.
        negative: the negative prompt.
        seed: of the noise.
        steps: denoising steps; None for the model's own.
        guidance: scale of classifier-free guidance, 1 for none; None for the model's own.
        size: of the result, such as ``"1024x768"``; None for the model's area at the aspect of the last image.
        record: number of steps that are recorded, spread evenly, the first and the last among them.
        chain: number of edits in a row, each with the same instruction, noise and settings on the result of the one
            before; 0 for none.
        target: path of the exact answer, an image of the size of the result.
    """

    name: Annotated[str, Matching(pattern=r"\w[\w .-]{0,39}", example="two images")]
    images: tuple[str, ...]
    instruction: _Text
    negative: Annotated[str, Matching(pattern=r"(?s:.{0,2000})", example="blurry")] = DEFAULT_NEGATIVE
    seed: Annotated[int, Within(low=0, high=(1 << 63) - 1)] = 0
    steps: Annotated[int, Within(low=1, high=1000, unit="steps")] | None = None
    guidance: Annotated[float, Within(low=1, high=100)] | None = None
    size: Annotated[str, Matching(pattern=r"\d{2,5}x\d{2,5}", example="1024x768")] | None = None
    record: Annotated[int, Within(low=1, high=1000, unit="steps")] = 3
    chain: Annotated[int, Within(low=0, high=_CHAIN_MAX, unit="edits")] = 0
    target: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cases:
    cases: tuple[CaseTable, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One edit to record, complete.

    Attributes:
        name: unique.
        images: mode RGB, in their own size.
        instruction: of the edit.
        negative: the negative prompt.
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance, 1 for none.
        width, height: of the result in pixels.
        recorded: the steps that are recorded, ascending.
        chain: number of edits in a row; 0 for none.
        target: the exact answer; None where there is none.
    """

    name: str
    images: tuple[Image.Image, ...] = field(repr=False)
    instruction: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    recorded: tuple[int, ...]
    chain: int
    target: Image.Image | None = field(repr=False)


def find_cases(given: Path | None, folder: Path, model: Model) -> tuple[Case, ...]:
    """The cases of the file ``given``; without one those in the checkpoint's ``folder``, else those that qie ships.

    Raises:
        GoldenError: see ``read_cases``.
    """
    if given is None and not (folder / CASES_FILE).is_file():
        return shipped_cases(model)
    return read_cases(given or folder / CASES_FILE, model)


def read_cases(path: Path, model: Model) -> tuple[Case, ...]:
    """The cases of a TOML file for ``model``, with their images.

    Raises:
        GoldenError: the file or an image is missing or malformed, a key is unknown or missing, two cases have one
            name, or the model does not take such an edit.
    """
    tables = _read(path)
    if not 1 <= len(tables) <= _CASES_MAX:
        raise _wrong(f"{path} has {len(tables)} cases, expected 1 to {_CASES_MAX}; write each under [[cases]]")
    names = [table.name for table in tables]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(f"{path} has {names.count(name)} cases with the name {name!r}; rename all but one")
    return tuple(_complete(table, path, model) for table in tables)


def shipped_cases(model: Model) -> tuple[Case, ...]:
    """Cases for any model, on drawn images: guidance, a tall image with edits in a row, and several images.

    They have few steps and small results, because a pass of the published transformer takes minutes on a CPU, and a
    recorded step a tensor of the result's size for each velocity. A model of a smaller area has results of that area.
    """
    own = model.areas.vae_area < 416 * 736
    drawn = (waves(1248, 832, seed=0), waves(768, 1344, seed=1))
    tables: list[tuple[CaseTable, Sequence[Image.Image]]] = [
        (
            CaseTable(
                name="guided",
                images=("0",),
                instruction="make it night",
                seed=1,
                steps=8,
                size=None if own else "640x416",
            ),
            drawn[:1],
        ),
        (
            CaseTable(
                name="in a row",
                images=("1",),
                instruction="turn it into a watercolor painting",
                seed=2,
                steps=8,
                guidance=1.0,
                chain=5,
                size=None if own else "416x736",
            ),
            drawn[1:],
        ),
    ]
    if model.pipeline == "edit_plus":
        table = CaseTable(
            name="two images",
            images=("0", "1"),
            instruction="give Picture 1 the colors of Picture 2",
            seed=3,
            steps=4,
            size=None if own else "416x736",
        )
        tables.append((table, drawn))
    return tuple(_completed(table, images, None, Path("the shipped cases"), model) for table, images in tables)


def waves(width: int, height: int, *, seed: int) -> Image.Image:
    """A smooth image, mode RGB: a few plane waves in each channel, from 2 to 24 of them across the longer side."""
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[:height, :width] / max(width, height)
    channels = []
    for _ in range(3):
        value = np.zeros((height, width))
        for frequency in (2, 5, 11, 24):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            across = columns * np.cos(angle) + rows * np.sin(angle)
            value += np.cos(2 * np.pi * frequency * across + phase) / frequency**0.5
        channels.append(128 + 62 * value)
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))


def _read(path: Path) -> tuple[CaseTable, ...]:
    try:
        content = read_regular(path, most=_FILE_MAX)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _wrong(f"{path} cannot be read ({reason}); name a TOML file of cases") from None
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{path} is not TOML ({error}); correct it as docs/validation.md describes") from None
    try:
        return build(_Cases, flatten(_Cases, table, path), path).cases
    except RecipeError as error:
        raise _wrong(f"{error}".replace("recipes/README.md", "docs/validation.md")) from None


def _complete(table: CaseTable, path: Path, model: Model) -> Case:
    """A case with the images that it names."""
    try:
        images = tuple(_image(path.parent / name) for name in table.images)
        target = None if table.target is None else _image(path.parent / table.target)
    except ImageError as error:
        raise _wrong(f"case {table.name!r} of {path}: {error}") from None
    return _completed(table, images, target, path, model)


def _image(path: Path) -> Image.Image:
    """The image in a file; a pipe, which ``load_image`` takes too, would give another one the next time."""
    try:
        special = path.exists() and not path.is_file() and not path.is_dir()
    except OSError:  # whose reason load_image tells
        special = False
    if special:
        raise ImageError(f"{path} is a pipe or a device; name an image file")
    return load_image(path).image


def _completed(
    table: CaseTable, images: Sequence[Image.Image], target: Image.Image | None, path: Path, model: Model
) -> Case:
    """A case with every default filled in."""
    where, most = f"case {table.name!r} of {path}", 3 if model.pipeline == "edit_plus" else 1
    if not 1 <= len(images) <= most:
        expected = f"1 to {most}" if most > 1 else "1"
        raise _wrong(f"{where} has {len(images)} images, this model takes {expected}; change its images")
    if table.chain == 1:
        raise _wrong(f"{where} has a chain of 1 edit, which is the edit itself; use 2 or more, or leave it out")
    if table.chain and len(images) > 1:
        raise _wrong(f"{where} has a chain and {len(images)} images, expected 1 image; leave the chain out")
    if not table.instruction.strip():
        raise _wrong(f"{where} has a blank instruction; write what to change")
    schedule = model.schedule or PUBLISHED
    steps = schedule.steps if table.steps is None else table.steps
    if steps > model.scheduler.num_train_timesteps:
        raise _wrong(f"{where} has {steps} steps, expected at most {model.scheduler.num_train_timesteps}; use fewer")
    try:
        width, height = output_size(images[-1].size, model.areas.vae_area)
        if table.size is not None:
            width, height = _size(table.size, where, model)
        for size in [image.size for image in images] + [(width, height)] * bool(table.chain):
            output_size(size, model.areas.vae_area)
            output_size(size, model.areas.condition_area or model.areas.vae_area)
    except ImageError as error:
        raise _wrong(f"{where}: {error}") from None
    if target is not None and target.size != (width, height):
        raise _wrong(
            f"{where} has a target of {target.width}x{target.height} pixels and a result of {width}x{height}; "
            "make the target as large as the result"
        )
    return Case(
        name=table.name,
        images=tuple(images),
        instruction=table.instruction,
        negative=table.negative,
        seed=table.seed,
        steps=steps,
        guidance=float(schedule.guidance if table.guidance is None else table.guidance),
        width=width,
        height=height,
        recorded=_spread(steps, min(table.record, steps)),
        chain=table.chain,
        target=target,
    )


def _size(text: str, where: str, model: Model) -> tuple[int, int]:
    """Width and height that ``text`` asks for, such as some bundle of ``model`` can have."""
    width, height = (int(side) for side in text.split("x"))
    if width % SIDE_MULTIPLE or height % SIDE_MULTIPLE or not width or not height:
        raise _wrong(f"{where} has the size {text}, expected sides that are multiples of {SIDE_MULTIPLE}; round them")
    most = min(AREA_SCALE_MAX * model.areas.vae_area, MAX_PIXELS)
    if width * height > most:
        raise _wrong(
            f"{where} has the size {text}, {width * height:,} pixels, expected at most {most:,} with this model; make "
            "it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _wrong(
            f"{where} has the size {text}, expected a side of at most {MAX_ASPECT} times the other; choose another"
        )
    return width, height


def _spread(steps: int, count: int) -> tuple[int, ...]:
    """``count`` of the numbers 0 .. ``steps`` - 1, spread evenly, the first and the last among them; 1 is the first."""
    if count == 1:
        return (0,)
    return tuple(round(number * (steps - 1) / (count - 1)) for number in range(count))


def _wrong(message: str) -> GoldenError:
    return GoldenError(message, option="cases")
