"""The golden file: one safetensors file with the tensors of every case and a JSON description with their digest.

Shapes: P patches, I images, V image tokens of the prompt, S prompt tokens with the template's prefix, L prompt tokens
without it, D width of the language model, R tokens of a reference image, N noise tokens, C = 64 latent channels of a
token, K recorded steps, T steps of the schedule.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.validation.golden.compress import unpacked
from qie.compiler.validation.golden.layout import check_layout
from qie.compiler.validation.golden.records import (
    CaseRecord,
    GoldenRecord,
    ModulesRecord,
    case_tensor,
    module_tensor,
)
from qie.engines.bundle.manifest import Component
from qie.engines.errors import CheckpointError, GoldenError
from qie.engines.files import replacing
from qie.engines.records import from_plain, to_plain

__all__ = [
    "GOLDEN_FILE",
    "CaseRecord",
    "Golden",
    "GoldenCase",
    "GoldenRecord",
    "ModulesRecord",
    "case_tensor",
    "is_golden",
    "module_tensor",
    "open_golden",
    "png",
    "tensors_digest",
    "write_golden",
]

GOLDEN_FILE = "golden.safetensors"
"""The name under which a checkpoint's folder may hold its golden file."""

DESCRIPTION = "qie.golden"
"""The key in the metadata of the safetensors file: the sha256 of the description, a space, and the description."""

Array = NDArray[Any]
Floats = NDArray[np.float32]
Arrays = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """The tensors of one case; all float32 unless stated otherwise.

    Attributes:
        record: the edit.
        tensors: by their name in the case.
    """

    record: CaseRecord
    tensors: Arrays

    @cached_property
    def images(self) -> tuple[Image.Image, ...]:
        """The input images in their own size."""
        return tuple(self._image(f"input.{k}") for k in range(self.record.images))

    @cached_property
    def edit(self) -> Image.Image:
        """The result of the reference."""
        return self._image("edit")

    @cached_property
    def target(self) -> Image.Image | None:
        """The exact answer, of the size of the result."""
        return self._image("target") if self.record.target else None

    @cached_property
    def chain(self) -> tuple[Image.Image, ...]:
        """The results of edits in a row, the first of which is ``edit``."""
        return tuple(self._image(f"chain.{k}") for k in range(self.record.chain))

    @cached_property
    def reference_images(self) -> tuple[NDArray[np.uint8], ...]:
        """The input images as resized for the VAE: uint8 [height, width, 3]."""
        return tuple(np.asarray(self._image(f"reference_image.{k}")) for k in range(self.record.images))

    @cached_property
    def patches(self) -> Floats:
        """[P, 1176], input of the vision tower in the image processor's order; compressed in the file."""
        return unpacked(self.tensors["patches"], int(self.grid_thw.prod(axis=1).sum()))

    @property
    def grid_thw(self) -> NDArray[np.int64]:
        """int64 [I, 3], patches of each image in time, height and width."""
        return self.tensors["grid_thw"]

    @property
    def image_embeds(self) -> Floats:
        """[V, D], output of the vision tower."""
        return self.tensors["image_embeds"]

    @property
    def input_ids(self) -> NDArray[np.int64]:
        """int64 [S], tokens of the prompt."""
        return self.tensors["input_ids"]

    @property
    def position_ids(self) -> NDArray[np.int64]:
        """int64 [3, S], positions of the prompt."""
        return self.tensors["position_ids"]

    @property
    def prompt_embeds(self) -> Floats:
        """[L, D] of the instruction."""
        return self.tensors["prompt_embeds"]

    @property
    def negative_embeds(self) -> Floats | None:
        """[L, D] of the negative prompt; None without guidance."""
        return self.tensors.get("negative_embeds")

    @cached_property
    def reference_latents(self) -> tuple[Floats, ...]:
        """[R, C] of each input image: packed, normalized."""
        return tuple(self.tensors[f"reference_latents.{k}"] for k in range(self.record.images))

    @property
    def noise(self) -> Floats:
        """[N, C], drawn in float32 from the seed."""
        return self.tensors["noise"]

    @property
    def noise_bfloat16(self) -> Floats:
        """[N, C], drawn in bfloat16 from the seed."""
        return self.tensors["noise_bfloat16"]

    @property
    def sigmas(self) -> Floats:
        """[T + 1], with the final zero."""
        return self.tensors["sigmas"]

    @property
    def latents(self) -> Floats:
        """[K, N, C] before each recorded step."""
        return self.tensors["latents"]

    @property
    def latents_next(self) -> Floats:
        """[K, N, C] after each recorded step."""
        return self.tensors["latents_next"]

    @property
    def velocity(self) -> Floats:
        """[K, N, C] of the conditional pass of each recorded step, before guidance."""
        return self.tensors["velocity"]

    @property
    def negative_velocity(self) -> Floats | None:
        """[K, N, C] of the negative pass; None without guidance."""
        return self.tensors.get("negative_velocity")

    @property
    def final_latents(self) -> Floats:
        """[N, C] after the last step."""
        return self.tensors["final_latents"]

    def _image(self, name: str) -> Image.Image:
        with Image.open(io.BytesIO(self.tensors[name].tobytes())) as image:
            return image.convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """An opened golden file, whose tensors match their digest.

    Attributes:
        path: the file.
        record: its description.
        cases: in its order.
        modules: the samples of each component's modules by name, float32, in the order in which the modules ran.
    """

    path: Path
    record: GoldenRecord
    cases: tuple[GoldenCase, ...]
    modules: Mapping[Component, Mapping[str, Floats]]


def png(image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
    """An image, uint8 [height, width, 3], as the bytes of a PNG file: uint8 [bytes]."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, "PNG", optimize=True)
    return np.frombuffer(file.getvalue(), np.uint8)


def tensors_digest(tensors: Arrays) -> str:
    """The sha256 over name, dtype, shape and content of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_golden(record: GoldenRecord, tensors: Arrays, path: Path) -> None:
    """Write a golden file; ``record.tensors`` is filled in from ``tensors``, which have the names of the file.

    Raises:
        OSError: it cannot be written; an earlier file stays.
    """
    description = json.dumps(to_plain(record) | {"tensors": tensors_digest(tensors)})
    metadata = {DESCRIPTION: f"{hashlib.sha256(description.encode()).hexdigest()} {description}"}
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(arrays, metadata=metadata))


def is_golden(path: Path) -> bool:
    """Whether a file says that it is a golden file; it may be damaged."""
    try:
        return DESCRIPTION in open_file(path).metadata
    except CheckpointError:
        return False


def open_golden(path: Path) -> Golden:
    """Read a golden file and compare its tensors with their digest.

    Raises:
        GoldenError: it cannot be read, is no golden file, or is damaged.
    """
    try:
        reader = open_file(path)
        tensors = {name: np.array(reader.read(name)) for name in reader.names()}
        found = reader.metadata.get(DESCRIPTION)
    except CheckpointError as problem:
        reason, _, _ = str(problem).partition(";")
        raise GoldenError(
            f"the golden file {path} cannot be read ({reason}); record it again with `qie golden`"
        ) from None
    if found is None:
        raise GoldenError(f"{path} is not a golden file; record one with `qie golden`")
    sha256, _, description = found.partition(" ")
    if hashlib.sha256(description.encode("utf-8", "replace")).hexdigest() != sha256:
        raise GoldenError(
            f"the golden file {path} is damaged: its description does not have its digest; record it again"
        )
    try:
        record = from_plain(GoldenRecord, json.loads(description))
    except (ValueError, RecursionError) as problem:
        raise GoldenError(
            f"the description of {path} does not fit this qie ({problem}); record it again with `qie golden`"
        ) from None
    if tensors_digest(tensors) != record.tensors:
        raise GoldenError(f"the golden file {path} is damaged: its tensors do not have its digest; record it again")
    try:
        check_layout(record, tensors)
    except ValueError as problem:
        raise GoldenError(f"the golden file {path} is not as it says: {problem}; record it again") from None
    return Golden(
        path=path,
        record=record,
        cases=tuple(
            GoldenCase(record=case, tensors=_under(tensors, case_tensor(number, "")))
            for number, case in enumerate(record.cases)
        ),
        modules={
            modules.component: {name: tensors[module_tensor(modules.component, name)] for name in modules.names}
            for modules in record.modules
        },
    )


def _under(tensors: Arrays, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
