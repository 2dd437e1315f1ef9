"""The manifest of a bundle: all that the runtime knows of model, engines and limits, as one JSON file.

The runtime reads this file and nothing else to decide what to load and how to feed it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qie.engines.bundle.specs import Areas, PromptSpec, RotarySpec, SchedulerSpec, ShapeLimits, VisionSpec
from qie.engines.errors import BundleError
from qie.engines.records import from_plain, to_plain

__all__ = [
    "COMPONENTS",
    "MANIFEST",
    "SCHEMA",
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
    "TensorSpec",
    "modulation_rows",
    "read_manifest",
    "write_manifest",
]

SCHEMA = 1
MANIFEST = "manifest.json"

Component = Literal["vision", "language", "vae_encoder", "transformer", "vae_decoder"]
Residency = Literal["resident", "sequential"]

COMPONENTS: tuple[Component, ...] = ("vision", "language", "vae_encoder", "transformer", "vae_decoder")
"""Every component, in the order in which an edit uses them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of an engine. A dim that is a name is free at run time; equal names are equal sizes."""

    name: str
    dtype: Literal["float32", "bfloat16", "int64", "uint8"]
    dims: tuple[int | str, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape where ``sizes`` gives every free dim."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file of the bundle: path relative to the bundle, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileRecord:
    """The smallest, tuned-for and largest shape of one input, for engines that are bound to them."""

    input: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationRecord:
    """``quantized`` of the ``linears`` of a component hold codes of the recipe's ``scheme``.

    ``fused`` of these are computed by a kernel that takes the codes, as far as an engine's own description says; None
    where it says nothing, or is none.
    """

    scheme: str
    quantized: int
    linears: int
    fused: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """One component built for one target.

    ``path`` is the file that the backend opens, ``files`` everything it needs. ``key`` is the sha256 of all that
    decided the engine: graph, weights, recipe section, versions; an equal key means an equal engine.
    ``compute_capability`` is "cpu" for engines that run on the processor. ``build_peak_bytes`` is the most memory
    that the building process held. ``activation_bytes`` is what a run of the largest shapes needs on the device beside
    the weights, None where the backend does not say. ``structure`` lists the layers, their types and precisions, for
    engines that cannot be opened without their device.
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
    parameters: int
    build_seconds: float
    build_peak_bytes: int
    profiles: tuple[ProfileRecord, ...] = ()
    quantization: QuantizationRecord | None = None
    activation_bytes: int | None = None
    structure: FileRecord | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphRecord:
    """One component as ONNX: what a builder makes an engine for ``backend`` of, here or on another machine.

    ``path`` is the .onnx file, ``files`` are that and its weights. ``dtype`` is what it computes in. ``key`` is the
    sha256 of all that decided the graph and its weights. ``profiles`` are the shapes that the engine shall take.
    """

    component: Component
    backend: str
    dtype: Literal["float32", "bfloat16"]
    key: str
    path: str
    files: tuple[FileRecord, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    profiles: tuple[ProfileRecord, ...]
    quantization: QuantizationRecord | None = None


def modulation_rows(zero_cond_t: bool) -> int:
    """Modulation vectors a block: shift, gain, gate of attention, then of the feed-forward, for noise tokens, then
    (``zero_cond_t``) for reference tokens, then for text tokens."""
    return 18 if zero_cond_t else 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulationTensor:
    """A tensor of the modulation weights: its place in the file, [out, in] or [out] as in the checkpoint."""

    name: str
    dtype: Literal["float32", "bfloat16"]
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulationRecord:
    """The weights that turn a timestep into modulation, for schedules that were not precomputed.

    ``tables`` is the dtype in which the transformer uses what comes out of them.
    """

    file: FileRecord
    tables: Literal["float32", "bfloat16"]
    tensors: tuple[ModulationTensor, ...]
    layers: int
    width: int
    zero_cond_t: bool

    @property
    def values(self) -> int:
        """Numbers that a timestep has in the tables: every block's rows, and two rows for the output norm."""
        return (self.layers * modulation_rows(self.zero_cond_t) + 2) * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRecord:
    """What the model is, and every constant of it that the runtime needs.

    ``about`` is what a small model says of itself to whoever runs it.
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
    latent_channels: int
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
    """What an edit uses where it is not told otherwise. ``noise`` is the dtype in which torch would draw it."""

    steps: int
    guidance: float
    noise: Literal["float32", "bfloat16"]
    residency: Residency


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A bundle's table of contents.

    ``graphs`` are those of which engines are yet to be built, on the GPU's machine. ``calibration`` is what the scales
    of quantized components came from.
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

    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the bundle but the manifest itself, each once."""
        records = [self.tokenizer, self.model.modulation.file, *self.schedules]
        if self.calibration is not None:
            records.append(self.calibration)
        for engine in self.engines:
            records.extend(engine.files)
            if engine.structure is not None:
                records.append(engine.structure)
        for graph in self.graphs:
            records.extend(graph.files)
        return tuple({r.path: r for r in records}.values())


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest`` as the last file of a bundle under construction."""
    text = json.dumps(to_plain(manifest), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the bundle ``folder``.

    Raises:
        BundleError: there is none, it is not JSON, it was written by another schema, or a key is wrong.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}; `qie list` shows the bundles") from None
    except (ValueError, OSError) as problem:
        raise BundleError(f"{path} cannot be read ({problem}); build the bundle again with `qie build`") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has schema {schema!r}, this qie reads schema {SCHEMA}; build the bundle again with `qie build`"
        )
    try:
        return from_plain(Manifest, data)
    except ValueError as problem:
        raise BundleError(f"{path}: {problem}; build the bundle again with `qie build`") from None
