"""The schema of recipes: one TOML file with all settings of a build for one GPU.

A field is a key, a nested dataclass is a table, a default makes the key optional. A file may have ``extends = "l40s"``
(a name, or a path relative to the file); tables then merge key by key and arrays replace. recipes/README.md lists every
key with its type, unit and default.

Memory is in GiB, sides are in pixels.
"""

import hashlib
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from qie.compiler.recipe.gates import Gates
from qie.compiler.recipe.quantizable import SchemeName
from qie.compiler.recipe.toml import Matching, OneOf, Within, write
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import COMPONENTS, Component, Residency, Specialization
from qie.engines.bundle.specs import SIDE_MULTIPLE, ShapeLimits, Size
from qie.engines.errors import RecipeError
from qie.engines.inputs.sizes import calculate_dimensions

__all__ = [
    "AREA_SCALE_MAX",
    "DIVISIBLE",
    "FP8_CAPABILITY",
    "REFERENCES_MAX",
    "Attention",
    "BackendName",
    "ComponentRecipe",
    "Components",
    "Limits",
    "Modulation",
    "Noise",
    "Precision",
    "Range",
    "Recipe",
    "Schedule",
    "SchemeName",
    "Shapes",
    "supports_fp8",
    "supports_fp8_attention",
    "to_toml",
]

BackendName = Annotated[str, OneOf(what="backend", table=BACKENDS)]
Modulation = Literal["tables", "weights"]
Noise = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "float16"]
Attention = Literal["none", "fp8"]

FP8_CAPABILITY = "8.9"
"""The first compute capability with FP8 tensor cores (Ada); engine compilers refuse E4M3 below it."""

DIVISIBLE: tuple[Component, ...] = ("language", "transformer")
"""Components that can be built in parts, which are engines of consecutive blocks."""

AREA_SCALE_MAX = 16
"""Largest area of a result, as a multiple of the model's area."""

REFERENCES_MAX = 3
"""The Plus models take one to three images (model cards of -2509 and -2511), the Edit model takes one."""

Count = Annotated[int, Within(low=1, high=65536)]
Gib = Annotated[float, Within(low=0.25, high=4096, unit="GiB")]
AspectRatio = Annotated[str, Matching(pattern=r"[1-9]\d{0,2}:[1-9]\d{0,2}", example="16:9")]
Capability = Annotated[str, Matching(pattern=r"\d{1,2}\.\d", example="8.9")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentRecipe:
    """How one component computes.

    Attributes:
        precision: type of weights and activations.
        scheme: quantization scheme of the linears.
        exclude: fnmatch patterns of linears that stay in ``precision``.
        attention: precision of attention's two products; "none" leaves them in ``precision``. On a GPU, "fp8" needs
            backends whose attention kernels compute in FP8.
        backend: backend that comes before those of the recipe for this component; None for no other.
        parts: number of consecutive engines; None for as few as can be built in the host memory of the build.
    """

    precision: Precision = "bfloat16"
    scheme: SchemeName = "none"
    exclude: tuple[str, ...] = ()
    attention: Attention = "none"
    backend: BackendName | None = None
    parts: Annotated[int, Within(low=1, high=64)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """One ``ComponentRecipe`` per component."""

    vision: ComponentRecipe = field(default_factory=ComponentRecipe)
    language: ComponentRecipe = field(default_factory=ComponentRecipe)
    vae_encoder: ComponentRecipe = field(default_factory=ComponentRecipe)
    transformer: ComponentRecipe = field(default_factory=ComponentRecipe)
    vae_decoder: ComponentRecipe = field(default_factory=ComponentRecipe)

    def __getitem__(self, component: Component) -> ComponentRecipe:
        section: ComponentRecipe = getattr(self, component)
        return section


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A dynamic dimension, 1 <= min <= opt <= max.

    Attributes:
        min: smallest value.
        opt: value that engines are tuned for.
        max: largest value.
    """

    min: Count
    opt: Count
    max: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Sizes that the engines take.

    Attributes:
        aspect_ratios: width:height of the buckets, each at the model's area.
        min_side: shortest side in pixels.
        area_scale_max: largest area as a multiple of the model's area.
        batch: images per run.
        references: input images per edit.
        prompt_tokens: text tokens after the template's prefix, image tokens included. The Edit model has 1369 image
            tokens at 1024 x 1024 pixels; an instruction has up to 1024 tokens.
    """

    aspect_ratios: tuple[AspectRatio, ...] = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")
    min_side: Annotated[int, Within(low=16, high=4096, unit="pixels", multiple=SIDE_MULTIPLE)] = 128
    area_scale_max: Annotated[float, Within(low=1, high=AREA_SCALE_MAX, unit="times the model's area")] = 1.0
    batch: Range = Range(min=1, opt=1, max=4)
    references: Range = Range(min=1, opt=1, max=3)
    prompt_tokens: Range = Range(min=8, opt=256, max=2560)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A schedule whose modulation tables are computed at build time.

    Attributes:
        steps: denoising steps.
        guidance: scale of true classifier-free guidance, 1 for none.
        sizes: aspect ratios of ``Shapes``, or "all".
    """

    steps: Annotated[int, Within(low=1, high=1000, unit="steps")]
    guidance: Annotated[float, Within(low=1, high=100)]
    sizes: Literal["all"] | tuple[AspectRatio, ...] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a build.

    Attributes:
        build_workspace_gib: the engine compiler's workspace on the GPU.
        host_memory_gib: most host memory of a build for which none is chosen; None for that of the machine.
    """

    build_workspace_gib: Gib = 8.0
    host_memory_gib: Gib | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        schema: version of the format.
        gpu: name of the GPU, for people.
        compute_capability: like "8.9"; None for a CPU.
        memory_gib: memory that engines may take; of a GPU, the total of ``nvidia-smi`` less about half a GiB for the
            CUDA context.
        backends: backends in order of preference.
        residency: whether all engines stay loaded or each is loaded when it runs.
        specialization: kernels of TensorRT for RTX for shapes that vary: "none" uses those that serve every shape,
            "eager" compiles kernels for every new shape before its first run.
        noise: dtype in which the initial noise is drawn; diffusers uses the dtype of the pipeline
            (pipeline_qwenimage_edit_plus.py, prepare_latents).
        calibration: path of a file of ``qie calibrate``, for builds that name none.
        modulation: "tables" puts the modulation tables of the schedules into the bundle, "weights" also the weights
            that make those of any other schedule.
        components: settings of each component.
        shapes: sizes that the engines take.
        limits: limits of the build.
        gates: bounds of ``qie validate``.
        schedules: schedules whose tables are computed at build time; the first is the default of an edit.
    """

    schema: Literal[2] = 2
    gpu: Annotated[str, Matching(pattern=r"[ -~]*[!-~][ -~]*", example="L40S")]
    compute_capability: Capability | None = None
    memory_gib: Gib
    backends: tuple[BackendName, ...]
    residency: Residency = "resident"
    specialization: Specialization = "none"
    noise: Noise = "bfloat16"
    calibration: str | None = None
    modulation: Modulation = "tables"
    components: Components = field(default_factory=Components)
    shapes: Shapes = field(default_factory=Shapes)
    limits: Limits = field(default_factory=Limits)
    gates: Gates = field(default_factory=Gates)
    schedules: tuple[Schedule, ...] = (
        Schedule(steps=40, guidance=4.0),
        Schedule(steps=8, guidance=1.0),
        Schedule(steps=4, guidance=1.0),
    )

    def digest(self) -> str:
        """sha256 (hex) of the resolved content, without comments and file names."""
        return hashlib.sha256(to_toml(self.portable()).encode()).hexdigest()

    @property
    def quantizes(self) -> bool:
        """Whether a component is quantized, for which a calibration is needed."""
        sections = [self.components[component] for component in COMPONENTS]
        return any(section.scheme != "none" or section.attention != "none" for section in sections)

    def portable(self) -> "Recipe":
        """The recipe without the path of a calibration, which is valid on this machine only."""
        return replace(self, calibration=None)

    def backends_of(self, component: Component) -> tuple[BackendName, ...]:
        """The backends that can run a component, in order of preference; never empty in a checked recipe.

        The component's own comes first. The others are for machines on which that is not installed.
        """
        own = self.components[component].backend
        candidates = dict.fromkeys((*(() if own is None else (own,)), *self.backends))
        return tuple(backend for backend in candidates if self.misfit(backend, component) is None)

    def misfit(self, backend: BackendName, component: Component) -> str | None:
        """Why ``backend`` cannot run a component of this recipe, as the end of a sentence; None where it can."""
        row, section = BACKENDS[backend], self.components[component]
        quantized = section.scheme != "none" or section.attention != "none"
        if component not in row.components:
            return f"runs only {' and '.join(row.components)}"
        if row.precisions and section.precision not in row.precisions:
            return f"computes in {' or '.join(row.precisions)} and not in {section.precision}"
        if row.schemes is not None and section.scheme not in ("none", *row.schemes):
            return f"does not execute the scheme {section.scheme}"
        if row.schemes is not None and section.attention != "none":
            return "does not compute attention in FP8"
        if component == "vision" and row.source == "transformers" and not self._is_beside_language(backend):
            return "runs vision only beside language in the same precision"
        if section.parts is not None and section.parts > 1 and row.source != "graph":
            return "is built whole and not in parts"
        needs_kernels = quantized and section.precision == "bfloat16" and self.compute_capability is not None
        if needs_kernels and not row.quantized_bfloat16:
            return "has no kernels for quantized linears in bfloat16 on a GPU"
        return None

    def _is_beside_language(self, backend: BackendName) -> bool:
        """Whether ``backend`` is the first for language too, in the precision of vision."""
        same = self.components.vision.precision == self.components.language.precision
        return same and self.backends_of("language")[:1] == (backend,)

    def buckets(self, area: int) -> tuple[Size, ...]:
        """The distinct sizes of the aspect ratios at ``area`` square pixels, in the recipe's order."""
        return _sizes(area, self.shapes.aspect_ratios)

    def schedule_sizes(self, schedule: Schedule, area: int) -> tuple[Size, ...]:
        """The distinct buckets for which ``schedule`` has tables."""
        return self.buckets(area) if schedule.sizes == "all" else _sizes(area, schedule.sizes)

    def shape_limits(self, area: int) -> ShapeLimits:
        """The limits of engines built by this recipe for a model of ``area`` square pixels.

        The largest side and area are those of the buckets, or the model's area times ``area_scale_max``. The shortest
        side is ``shapes.min_side`` or, for a small model, that of its narrowest bucket.
        """
        buckets = self.buckets(area)
        scale = self.shapes.area_scale_max
        side = max(max(bucket.width, bucket.height) for bucket in buckets) * scale**0.5
        return ShapeLimits(
            buckets=buckets,
            min_side=min(self.shapes.min_side, *(min(bucket.width, bucket.height) for bucket in buckets)),
            max_side=int(side // SIDE_MULTIPLE) * SIDE_MULTIPLE,
            max_area=max(int(area * scale), *(bucket.area for bucket in buckets)),
            batch_max=self.shapes.batch.max,
            references_max=self.shapes.references.max,
            prompt_tokens_max=self.shapes.prompt_tokens.max,
        )


def to_toml(recipe: Recipe) -> str:
    """A resolved recipe as TOML text with every key; ``parse_recipe`` reads it back to an equal one."""
    return write(recipe)


def supports_fp8(compute_capability: str) -> bool:
    """Whether a GPU of that compute capability has FP8 tensor cores."""
    return _version(compute_capability) >= _version(FP8_CAPABILITY)


def supports_fp8_attention(backend: BackendName, compute_capability: str) -> bool:
    """Whether kernels of ``backend`` compute attention in FP8 on a GPU of that compute capability."""
    first = BACKENDS[backend].fp8_attention
    return first is not None and _version(compute_capability) >= _version(first)


def _version(compute_capability: str) -> tuple[int, ...]:
    """Comparable: "8.9" comes before "8.10"."""
    return tuple(int(part) for part in compute_capability.split("."))


def _sizes(area: int, ratios: tuple[str, ...]) -> tuple[Size, ...]:
    sizes: dict[Size, None] = {}
    for ratio in ratios:
        width, height = ratio.split(":")
        sizes[size := calculate_dimensions(area, int(width) / int(height))] = None
        if not (size.width and size.height):
            raise RecipeError(
                f"the aspect ratio {ratio} has no size at {area} square pixels; remove it from shapes.aspect_ratios",
                option="gpu",
            )
    return tuple(sizes)
