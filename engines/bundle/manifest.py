"""The manifest of a bundle: model, engines and limits as one JSON file.

It is the only file that the runtime reads to decide what to load and how to feed it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qie.engines.bundle import modulation_rows
from qie.engines.bundle.specs import Areas, Count, PromptSpec, RotarySpec, SchedulerSpec, ShapeLimits, Size, VisionSpec
from qie.engines.files import sha256_of
from qie.engines.records import Range

__all__ = [
    "COMPONENTS",
    "MANIFEST",
    "SCHEMA",
    "AddedSchedule",
    "Component",
    "Defaults",
    "EngineRecord",
    "FileRecord",
    "GraphRecord",
    "LoraRecord",
    "Manifest",
    "ModelRecord",
    "ModulationRecord",
    "ModulationTensor",
    "ProfileRecord",
    "QuantizationRecord",
    "RecipeRecord",
    "Residency",
    "Specialization",
    "TensorSpec",
    "file_record",
    "stem",
    "titles",
]

_Number = Annotated[int, Range(0, 1 << 53)]
_Dim = Annotated[int, Range(1, 1 << 31)]
_SHA256 = re.compile("[0-9a-f]{64}")
SCHEMA = 4
MANIFEST = "manifest.json"

Component = Literal["vision", "language", "vae_encoder", "transformer", "vae_decoder"]
Residency = Literal["resident", "sequential"]
Specialization = Literal["none", "eager"]
"""Kernels of TensorRT for RTX for shapes that vary (DynamicShapesKernelSpecializationStrategy): "none" uses those that
serve every shape and compiles nothing, "eager" compiles kernels for every new shape before its first run. Its "lazy"
is not offered, because a result would depend on when a compiler in the background is done."""

COMPONENTS: tuple[Component, ...] = ("vision", "language", "vae_encoder", "transformer", "vae_decoder")
"""Every component, in the order in which an edit uses them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of an engine. A dim that is a name is free at run time; equal names are equal sizes."""

    name: str
    dtype: Literal["float32", "bfloat16", "int64", "uint8"]
    dims: tuple[_Dim | str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape where ``sizes`` gives every free dim."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the bundle: path relative to the bundle and inside it, size in bytes, sha256 in hex."""

    path: str
    bytes: Annotated[int, Range(0, 1 << 50)]
    sha256: str

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if "\0" in self.path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"the path {self.path!r} is not one inside the bundle")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"the sha256 is {self.sha256!r}, expected 64 hex digits")


def file_record(folder: Path, name: str) -> FileRecord:
    """The record of the file ``name`` in ``folder``, which is read for its checksum."""
    path = folder / name
    return FileRecord(path=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def stem(component: Component, number: int, count: int) -> str:
    """How the names of the files of part ``number`` of ``count`` begin: ``transformer``, or ``transformer.0``."""
    return component if count == 1 else f"{component}.{number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRecord:
    """The smallest, tuned-for and largest shape of one input."""

    input: str
    min: tuple[_Dim, ...]
    opt: tuple[_Dim, ...]
    max: tuple[_Dim, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRecord:
    """The quantized linears of a component.

    Attributes:
        scheme: how they are quantized.
        quantized: their number.
        linears: number of all linears of the component.
        fused: number of those that a kernel computes from quantized values, according to the engine's own description;
            None where there is no description.
    """

    scheme: str
    quantized: _Number
    linears: _Number
    fused: _Number | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """One component, or one part of it, built for one target.

    Attributes:
        component: what it computes.
        backend: who executes it.
        compute_capability: of the GPU, such as "8.9"; "cpu" for a CPU.
        backend_version: that built it.
        precision: dtype in which it computes.
        key: sha256 of everything that decided it: graph, weights, recipe section, versions; equal keys are equal
            engines.
        path: file that the backend opens.
        files: everything that it needs.
        inputs: in the order of the graph.
        outputs: in the order of the graph.
        parameters: of the model, in this engine.
        build_seconds: time of the build.
        build_peak_bytes: peak memory of the building process.
        profiles: shapes that it takes, for backends that fix them.
        quantization: its quantized linears.
        activation_bytes: memory that a run of the largest shapes needs beside the weights; None where unknown.
        structure: layers with their types and precisions, for engines that cannot be opened without their GPU.
        part: number of several consecutive engines of one component, from 0.
    """

    component: Component
    backend: str
    compute_capability: str
    backend_version: str
    precision: str
    key: str
    path: str
    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: _Number
    build_seconds: Annotated[float, Range(0, 1e9)]
    build_peak_bytes: _Number
    profiles: tuple[ProfileRecord, ...] = ()
    quantization: QuantizationRecord | None = None
    activation_bytes: _Number | None = None
    structure: FileRecord | None = None
    part: Annotated[int, Range(0, 1000)] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphRecord:
    """What a builder turns into an engine, here or on another machine: one component, or one part of it.

    It is an ONNX graph, a checkpoint in the format of TensorRT-LLM, or a text encoder as transformers stores it (
    ``qie.engines.backends.Source``).

    Attributes:
        component: what it computes.
        backend: that the engine is for.
        precision: dtype in which it computes.
        key: sha256 of everything that decided the graph and its weights.
        path: the .onnx file, or the config.json of a checkpoint or text encoder.
        files: that file and all others, such as its weights.
        inputs: in the order of the graph.
        outputs: in the order of the graph.
        parameters: of the model, in this graph.
        profiles: shapes that the engine must take.
        quantization: its quantized linears.
        part: number of several consecutive graphs of one component, from 0.
    """

    component: Component
    backend: str
    precision: Literal["float32", "bfloat16"]
    key: str
    path: str
    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: _Number
    profiles: tuple[ProfileRecord, ...]
    quantization: QuantizationRecord | None = None
    part: Annotated[int, Range(0, 1000)] = 0


def titles(records: Sequence[EngineRecord | GraphRecord]) -> tuple[str, ...]:
    """The component of each record for people, with the number of a part, such as ``transformer 1/2``."""
    targets = [(r.component, r.backend, getattr(r, "compute_capability", None)) for r in records]
    counts: dict[tuple[str, str, str | None], int] = {}
    for target, record in zip(targets, records, strict=True):
        counts[target] = max(counts.get(target, 1), record.part + 1)
    return tuple(
        record.component if counts[target] == 1 else f"{record.component} {record.part + 1}/{counts[target]}"
        for target, record in zip(targets, records, strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulationTensor:
    """A tensor of the modulation weights: its place in the file, [out, in] or [out] as in the checkpoint."""

    name: str
    dtype: Literal["float32", "bfloat16"]
    shape: tuple[_Dim, ...]
    offset: _Number


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulationRecord:
    """The weights that turn a timestep into modulation, which the bundle has for schedules without tables, or has not.

    Attributes:
        file: where the weights are; None where the bundle has tables alone.
        tables: dtype in which the transformer reads the modulation.
        tensors: of the file, in its order; none without a file.
        layers, width: of the transformer.
        zero_cond_t: references have modulation of their own, at timestep 0.
        digest: sha256 of the content of the weights, in the bundle or not; None in bundles of earlier versions.
        key: of the weights and the recipe's tables (``modulation_key``); None in bundles of earlier versions.
    """

    file: FileRecord | None
    tables: Literal["float32", "bfloat16"]
    tensors: tuple[ModulationTensor, ...]
    layers: Annotated[int, Range(1, 10_000)]
    width: Annotated[int, Range(1, 1 << 20)]
    zero_cond_t: bool
    digest: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.digest is None and self.file is None:
            raise ValueError("there is neither a file nor a digest of the modulation weights")
        if not all(_SHA256.fullmatch(value) for value in (self.digest, self.key) if value is not None):
            raise ValueError(f"the digests are {self.digest!r} and {self.key!r}, expected 64 hex digits")

    @property
    def identity(self) -> str:
        """What stands for the content of the weights in names of tables and in caches."""
        if self.digest is not None:
            return self.digest
        assert self.file is not None, "a record without file and digest"
        return self.file.sha256

    @property
    def values(self) -> int:
        """Numbers that a timestep has in the tables: every block's rows, and two rows for the output norm."""
        return (self.layers * modulation_rows.rows(references=self.zero_cond_t) + 2) * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecord:
    """The model, with every constant of it that the runtime needs.

    Attributes:
        name: of the checkpoint.
        revision: commit of the checkpoint; None for a folder.
        digest: of the checkpoint's content.
        pipeline: the diffusers pipeline that it is for.
        areas: to which images are resized.
        scheduler: constants of the noise schedule.
        vision: constants of the vision tower's inputs.
        prompt: constants of the prompt.
        rotary: constants of the transformer's rotary embedding.
        latent_channels: of the VAE.
        modulation: weights of the modulation.
        about: note of the checkpoint to the person who runs it.
    """

    name: str
    revision: str | None
    digest: str
    pipeline: Literal["edit", "edit_plus"]
    areas: Areas
    scheduler: SchedulerSpec
    vision: VisionSpec
    prompt: PromptSpec
    rotary: RotarySpec
    latent_channels: Annotated[int, Range(1, 4096)]
    modulation: ModulationRecord
    about: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecord:
    """A LoRA fused into the weights."""

    name: str
    sha256: str
    weight: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRecord:
    """The resolved recipe, verbatim."""

    name: str
    sha256: str
    toml: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """Defaults of a request.

    Attributes:
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        noise: dtype in which the noise is drawn, as in torch.
        residency: whether engines stay loaded between stages.
        specialization: kernels for shapes that vary.
    """

    steps: Count
    guidance: Annotated[float, Range(-1e6, 1e6)]
    noise: Literal["float32", "bfloat16"]
    residency: Residency
    specialization: Specialization = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedSchedule:
    """A schedule whose modulation tables were added to the bundle after its build."""

    steps: Count
    sizes: tuple[Size, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A bundle's table of contents.

    Attributes:
        schema: version of this layout, ``SCHEMA`` or an earlier one that is read.
        qie: version that built the bundle.
        model: the model and its constants.
        loras: those fused into the weights.
        recipe: the resolved recipe.
        limits: sizes that the engines take.
        defaults: of a request.
        tokenizer: the tokenizer's file.
        schedules: precomputed modulation tables.
        engines: of every component.
        graphs: those whose engines are not built yet, because they need the machine with the GPU.
        calibration: source of the scales of quantized components; None without one.
        planned_bytes: peak memory of the device in the largest edit, on a CPU of the whole process without what an
            encoder cache keeps of other edits, as ``qie plan`` says; None in bundles of earlier versions.
        added: the schedules among ``schedules`` that are not of the recipe.
    """

    schema: int
    qie: str
    model: ModelRecord
    loras: tuple[LoraRecord, ...]
    recipe: RecipeRecord
    limits: ShapeLimits
    defaults: Defaults
    tokenizer: FileRecord
    schedules: tuple[FileRecord, ...]
    engines: tuple[EngineRecord, ...]
    graphs: tuple[GraphRecord, ...] = ()
    calibration: FileRecord | None = None
    planned_bytes: _Number | None = None
    added: tuple[AddedSchedule, ...] = ()

    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the bundle but the manifest itself, each once."""
        optional = (self.model.modulation.file, self.calibration)
        records = [self.tokenizer, *(file for file in optional if file is not None), *self.schedules]
        for engine in self.engines:
            records.extend(engine.files)
            if engine.structure is not None:
                records.append(engine.structure)
        for graph in self.graphs:
            records.extend(graph.files)
        return tuple({r.path: r for r in records}.values())
