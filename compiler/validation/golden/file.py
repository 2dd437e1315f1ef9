"""The golden file: one safetensors file with the tensors of every case and a JSON description with their digest.

Shapes: P patches, I images, V image tokens of the prompt, S prompt tokens with the template's prefix, L prompt tokens
without it, D width of the language model, R tokens of a reference image, N noise tokens, C = 64 latent channels of a
token, K recorded steps, T steps of the schedule.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save

from qie.compiler.checkpoint.safetensors import open_file
from qie.engines.bundle.manifest import Component, LoraRecord
from qie.engines.errors import CheckpointError, GoldenError
from qie.engines.files import replacing
from qie.engines.records import Range, from_plain, to_plain

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
    "packed",
    "png",
    "tensors_digest",
    "write_golden",
]

GOLDEN_FILE = "golden.safetensors"
"""The name under which a checkpoint's folder may hold its golden file."""

DESCRIPTION, DESCRIPTION_SHA256 = "qie.golden", "qie.golden.sha256"
"""The keys of the description and of its digest in the metadata of the safetensors file."""

SCHEMA = 1

Array = NDArray[Any]
Floats = NDArray[np.float32]
Arrays = Mapping[str, Array]

_Count = Annotated[int, Range(0, 1 << 20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseRecord:
    """One edit of the reference.

    Attributes:
        name: unique in the file.
        instruction: of the edit.
        negative: the negative prompt.
        seed: of the noise.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 or less is none.
        width, height: of the result in pixels.
        images: number of input images.
        recorded: the steps whose latents and velocities are in the file, ascending.
        chain: number of edits in a row, each of the result of the one before; 0 for none.
        target: whether the file has the exact answer.
    """

    name: str
    instruction: str
    negative: str
    seed: Annotated[int, Range(0, 1 << 63)]
    steps: Annotated[int, Range(1, 1000)]
    guidance: Annotated[float, Range(-1e6, 1e6)]
    width: Annotated[int, Range(16, 1 << 16)]
    height: Annotated[int, Range(16, 1 << 16)]
    images: Annotated[int, Range(1, 3)]
    recorded: tuple[_Count, ...]
    chain: _Count = 0
    target: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulesRecord:
    """The modules of one component whose outputs were sampled during one run of the first case.

    The samples of a module are the elements of its output, seen as [rows, channels], at ``sample_places`` of its shape
    (modules.py, which defines the rows of each component). A block of the transformer has its image stream under its
    name and its text stream under its name and `` (text)``. Modules that the component's graph lacks are left out.

    Attributes:
        component: the component.
        step: of the schedule, for the transformer; 0 for the others.
        names: of the modules, as the checkpoint names their tensors, in the order in which they ran.
        shapes: [rows, channels] of the output of each.
        blocks: names of those that are a whole block.
    """

    component: Component
    step: _Count
    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenRecord:
    """The description of a golden file.

    Attributes:
        schema: version of this layout.
        qie: version that wrote the file.
        model: name of the checkpoint.
        digest: of the checkpoint, as in the manifest of a bundle.
        loras: fused into the weights.
        dtype: in which the reference computed.
        packages: (package, version) of the reference.
        tensors: sha256 of all tensors (``tensors_digest``).
        cases: in the order of the file.
        modules: of each component that was sampled.
    """

    schema: Literal[1]
    qie: str
    model: str
    digest: str
    loras: tuple[LoraRecord, ...]
    dtype: Literal["float32", "bfloat16"]
    packages: tuple[tuple[str, str], ...]
    tensors: str
    cases: tuple[CaseRecord, ...]
    modules: tuple[ModulesRecord, ...]


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
        return tuple(self._picture(f"input.{k}") for k in range(self.record.images))

    @cached_property
    def edit(self) -> Image.Image:
        """The result of the reference."""
        return self._picture("edit")

    @cached_property
    def target(self) -> Image.Image | None:
        """The exact answer, of the size of the result."""
        return self._picture("target") if self.record.target else None

    @cached_property
    def chain(self) -> tuple[Image.Image, ...]:
        """The results of edits in a row, the first of which is ``edit``."""
        return tuple(self._picture(f"chain.{k}") for k in range(self.record.chain))

    @cached_property
    def reference_images(self) -> tuple[NDArray[np.uint8], ...]:
        """The input images as resized for the VAE: uint8 [height, width, 3]."""
        return tuple(np.asarray(self._picture(f"reference_image.{k}")) for k in range(self.record.images))

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

    def _picture(self, name: str) -> Image.Image:
        with Image.open(io.BytesIO(self.tensors[name].tobytes())) as image:
            return image.convert("RGB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Golden:
    """An opened golden file, whose tensors match their digest.

    Attributes:
        path: the file.
        record: its description.
        cases: in its order.
        modules: the samples of each component's modules by name, float32.
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


def packed(array_PX: Floats) -> NDArray[np.uint8]:
    """An array that repeats itself, compressed with zlib: uint8 [bytes]."""
    return np.frombuffer(zlib.compress(array_PX.astype("<f4").tobytes(), 9), np.uint8)


def unpacked(compressed: NDArray[np.uint8], rows: int) -> Floats:
    """The float32 array with ``rows`` rows that ``packed`` compressed."""
    return np.frombuffer(zlib.decompress(compressed.tobytes()), "<f4").reshape(rows, -1)


def tensors_digest(tensors: Arrays) -> str:
    """The sha256 over name, dtype, shape and content of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def case_tensor(number: int, name: str) -> str:
    """The name in the file of the tensor ``name`` of the case ``number``."""
    return f"case.{number}.{name}"


def module_tensor(component: Component, name: str) -> str:
    """The name in the file of the samples of the module ``name``."""
    return f"module.{component}.{name}"


def write_golden(record: GoldenRecord, tensors: Arrays, path: Path) -> None:
    """Write a golden file; ``record.tensors`` is filled in from ``tensors``, which have the names of the file.

    Raises:
        OSError: it cannot be written; an earlier file stays.
    """
    description = json.dumps(to_plain(record) | {"tensors": tensors_digest(tensors)})
    metadata = {DESCRIPTION: description, DESCRIPTION_SHA256: hashlib.sha256(description.encode()).hexdigest()}
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
        description = reader.metadata.get(DESCRIPTION)
    except CheckpointError as problem:
        found, _, _ = str(problem).partition(";")
        raise GoldenError(
            f"the golden file {path} cannot be read ({found}); record it again with `qie golden`"
        ) from None
    if description is None:
        raise GoldenError(f"{path} is not a golden file; record one with `qie golden`")
    if hashlib.sha256(description.encode()).hexdigest() != reader.metadata.get(DESCRIPTION_SHA256):
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
    return Golden(
        path=path,
        record=record,
        cases=tuple(
            GoldenCase(record=case, tensors=_under(tensors, case_tensor(number, "")))
            for number, case in enumerate(record.cases)
        ),
        modules={
            modules.component: _under(tensors, module_tensor(modules.component, "")) for modules in record.modules
        },
    )


def _under(tensors: Arrays, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
