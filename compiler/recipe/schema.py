"""Recipes: one TOML file that says everything about a build for one GPU.

The dataclasses below are the schema: a field is a key, a nested dataclass is a table, a default makes the key
optional. A file may say ``extends = "l40s"`` (a name, or a path relative to itself); tables then merge key by key and
arrays replace. recipes/README.md lists every key with its type, unit and default.

Memory is in GiB, sides are pixels.
"""

import difflib
import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from qie.compiler.recipe.toml import Matching, Setting, Within, build, flatten, inline, write, wrong
from qie.engines.bundle.manifest import COMPONENTS, Component, Residency
from qie.engines.bundle.specs import SIDE_MULTIPLE, ShapeLimits, Size
from qie.engines.errors import RecipeError
from qie.engines.inputs.sizes import calculate_dimensions

__all__ = [
    "Backend",
    "ComponentRecipe",
    "Components",
    "Limits",
    "Noise",
    "Precision",
    "Range",
    "Recipe",
    "Schedule",
    "SchemeName",
    "Shapes",
    "load_recipe",
    "recipe_names",
    "to_toml",
]

Backend = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-llm", "vllm"]
Noise = Literal["float32", "bfloat16"]
Precision = Literal["float32", "bfloat16", "float16"]
SchemeName = Literal["none", "fp8", "int8-smooth", "w8a16", "w4a16"]

Attention = Literal["none", "fp8"]

PARTIAL_BACKENDS: dict[Backend, tuple[Component, ...]] = {
    "tensorrt-llm": ("language",),
    "vllm": ("vision", "language"),
}
"""The backends that run only some components, and which."""

QUANTIZED: tuple[Component, ...] = ("language", "transformer")
"""The components that may be quantized: vision tower and VAE are small, and their errors are seen."""

FP8_CAPABILITY = "8.9"
"""The first compute capability with FP8 tensor cores (Ada); the compilers refuse fp8_e4m3 below it."""

REFERENCES_MAX = 3
"""The Plus models take one to three images (their model cards), the Edit model one."""

RENAMED = {"quantization": "scheme", "keep": "exclude"}
"""Keys of a component in schema 1 -> their names in schema 2."""

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"

Count = Annotated[int, Within(low=1, high=65536)]
Gib = Annotated[float, Within(low=0.25, high=4096, unit="GiB")]
AspectRatio = Annotated[str, Matching(pattern=r"[1-9]\d{0,2}:[1-9]\d{0,2}", example="16:9")]
Capability = Annotated[str, Matching(pattern=r"\d{1,2}\.\d", example="8.9")]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentRecipe:
    """How one component computes: its precision, its quantization scheme, and the linears excluded from it.

    ``exclude`` holds fnmatch patterns on the names of linears. ``attention`` is that of the products of queries and
    keys and of weights and values, which stay in ``precision`` unless it says otherwise.
    """

    precision: Precision = "bfloat16"
    scheme: SchemeName = "none"
    exclude: tuple[str, ...] = ()
    attention: Attention = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """One ComponentRecipe a component."""

    vision: ComponentRecipe = field(default_factory=ComponentRecipe)
    language: ComponentRecipe = field(default_factory=ComponentRecipe)
    vae_encoder: ComponentRecipe = field(default_factory=ComponentRecipe)
    transformer: ComponentRecipe = field(default_factory=ComponentRecipe)
    vae_decoder: ComponentRecipe = field(default_factory=ComponentRecipe)

    def __getitem__(self, component: Component) -> ComponentRecipe:
        found: ComponentRecipe = getattr(self, component)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A dynamic dimension: smallest, tuned-for and largest value, 1 <= min <= opt <= max."""

    min: Count
    opt: Count
    max: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """What sizes the engines take.

    ``aspect_ratios`` (width:height) at the model's area give the buckets. ``batch`` is images a run, ``references``
    images an edit, ``prompt_tokens`` text tokens after the template's prefix, image tokens included: the Edit model
    has 1369 of those at 1024 x 1024 pixels and up to 1024 tokens of instruction. ``min_side`` is in pixels;
    ``area_scale_max`` is the largest area as a multiple of the model's own.
    """

    aspect_ratios: tuple[AspectRatio, ...] = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21")
    min_side: Annotated[int, Within(low=16, high=4096, unit="pixels", multiple=SIDE_MULTIPLE)] = 128
    area_scale_max: Annotated[float, Within(low=1, high=16, unit="times the model's area")] = 1.0
    batch: Range = Range(min=1, opt=1, max=4)
    references: Range = Range(min=1, opt=1, max=3)
    prompt_tokens: Range = Range(min=8, opt=256, max=2560)


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A schedule whose modulation tables are made at build time; ``sizes`` are aspect ratios of ``Shapes``, or all."""

    steps: Annotated[int, Within(low=1, high=1000, unit="steps")]
    guidance: Annotated[float, Within(low=1, high=100)]
    sizes: Literal["all"] | tuple[AspectRatio, ...] = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a build may take: the engine compiler's workspace on the GPU, and memory of the host."""

    build_workspace_gib: Gib = 8.0
    host_memory_gib: Gib = 32.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A resolved recipe.

    ``compute_capability`` is None for a CPU. ``memory_gib`` is the memory that engines may take: of a GPU,
    what ``nvidia-smi`` names as its total less about half a GiB for the CUDA context.
    ``backends`` are in order of preference. ``residency`` says whether all engines stay loaded or each is loaded for
    its turn. ``noise`` is the dtype in which the initial noise is drawn; diffusers draws it in the dtype of the
    pipeline (pipeline_qwenimage_edit_plus.py, prepare_latents). ``calibration`` is the path of a file of ``qie
    calibrate``, for builds that name none. The first of ``schedules`` is ``qie run``'s default.
    """

    schema: Literal[2] = 2
    gpu: Annotated[str, Matching(pattern=r"[ -~]*[!-~][ -~]*", example="L40S")]
    compute_capability: Capability | None = None
    memory_gib: Gib
    backends: tuple[Backend, ...]
    residency: Residency = "resident"
    noise: Noise = "bfloat16"
    calibration: str | None = None
    components: Components = field(default_factory=Components)
    shapes: Shapes = field(default_factory=Shapes)
    limits: Limits = field(default_factory=Limits)
    schedules: tuple[Schedule, ...] = (
        Schedule(steps=40, guidance=4.0),
        Schedule(steps=8, guidance=1.0),
        Schedule(steps=4, guidance=1.0),
    )

    def digest(self) -> str:
        """Return the sha256 (hex) of the resolved content; comments and file names do not count."""
        return hashlib.sha256(to_toml(self.portable()).encode()).hexdigest()

    def portable(self) -> "Recipe":
        """Return the recipe without what holds on this machine alone, the path of a calibration."""
        return replace(self, calibration=None)

    def backends_of(self, component: Component) -> tuple[Backend, ...]:
        """Return the backends that can run a component, in order of preference; never empty."""
        return tuple(b for b in self.backends if component in PARTIAL_BACKENDS.get(b, COMPONENTS))

    def buckets(self, area: int) -> tuple[Size, ...]:
        """Return the sizes of the aspect ratios at an area in square pixels, each once, in the recipe's order."""
        return _sizes(area, self.shapes.aspect_ratios)

    def schedule_sizes(self, schedule: Schedule, area: int) -> tuple[Size, ...]:
        """Return the buckets for which a schedule of this recipe wants tables, each once."""
        return self.buckets(area) if schedule.sizes == "all" else _sizes(area, schedule.sizes)

    def shape_limits(self, area: int) -> ShapeLimits:
        """Return what engines built by this recipe take for a model of ``area`` square pixels.

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


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that qie ships, sorted."""
    return tuple(sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml")))


def load_recipe(name_or_path: str) -> Recipe:
    """Return the resolved recipe of a name (case does not count) or of a path that ends in ``.toml``.

    Raises:
        RecipeError: the name or file is unknown, the file is no TOML, a key is unknown, or a value is of the wrong
            type, out of range, or more than the recipe's GPU can do.
    """
    path = _find(name_or_path, Path())
    settings = _read(path, ())
    recipe = build(Recipe, settings, path)
    _check(recipe, path)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """Return a resolved recipe as TOML text with every key; ``load_recipe`` reads it back to an equal Recipe."""
    return write(recipe)


def _sizes(area: int, ratios: tuple[str, ...]) -> tuple[Size, ...]:
    pairs = (ratio.split(":") for ratio in ratios)
    return tuple(dict.fromkeys(calculate_dimensions(area, int(width) / int(height)) for width, height in pairs))


def _find(name_or_path: str, folder: Path) -> Path:
    """Return the file of a recipe; a relative path starts at ``folder``."""
    names = recipe_names()
    if name_or_path.lower() in names:
        return RECIPES_FOLDER / f"{name_or_path.lower()}.toml"
    if name_or_path.endswith(".toml"):
        return folder / name_or_path
    near = difflib.get_close_matches(name_or_path.lower(), names, n=1)
    guess = f', did you mean "{near[0]}"?' if near else ";"
    raise RecipeError(
        f'there is no recipe "{name_or_path}"{guess} qie has {", ".join(names)}, or give the path of a .toml file'
    )


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Setting]:
    """Return a file's settings by dotted key, those of the recipe it extends included. ``chain`` are its extenders."""
    real = path.resolve()
    if real in chain:
        circle = " -> ".join(file.name for file in (*chain[chain.index(real) :], real))
        raise RecipeError(f"recipes extend each other in a circle ({circle}); remove one of the extends")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path} ({error.strerror}); check the path") from error
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    _refuse_schema_1(table, path)
    parent = table.pop("extends", None)
    settings = flatten(Recipe, table, path, beside=("extends",))
    calibration = settings.get("calibration")
    if calibration is not None and isinstance(calibration.value, str):
        settings["calibration"] = Setting(value=str((path.parent / calibration.value).resolve()), file=path)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise wrong("extends", Setting(value=parent, file=path), 'a string like "l40s"')
    return _read(_find(parent, path.parent), (*chain, real)) | settings


def _refuse_schema_1(table: Mapping[str, object], file: Path) -> None:
    """Refuse a recipe with keys of schema 1; a recipe that extends another may have no ``schema`` key.

    Raises:
        RecipeError: the recipe is one of schema 1.
    """
    components = table.get("components")
    sections = components.values() if isinstance(components, dict) else ()
    renamed = any(isinstance(section, dict) and section.keys() & RENAMED.keys() for section in sections)
    schema = table.get("schema")
    if (type(schema) is int and schema == 1) or renamed or "gates" in table:
        keys = " and ".join(f"{old} to {new}" for old, new in RENAMED.items())
        raise RecipeError(
            f"{file} has schema 1, expected 2; rename the component keys {keys}, delete [gates] and set schema to 2"
        )


def _check(recipe: Recipe, file: Path) -> None:
    """Raise RecipeError where keys that are right by themselves contradict each other."""
    for key, why in _contradictions(recipe):
        raise RecipeError(f"{key} in {file} {why}")


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each contradiction of a recipe as a key and the rest of a sentence."""
    shapes, capability = recipe.shapes, recipe.compute_capability
    gpu = f"{recipe.gpu} ({capability or 'no compute_capability, so a CPU'})"
    for name in COMPONENTS:
        part, key = recipe.components[name], f"components.{name}"
        if name == "transformer" and part.precision == "float16":
            yield f"{key}.precision", 'is "float16", which overflows and gives black images; use "bfloat16"'
        if capability is None and part.precision == "bfloat16":
            yield f"{key}.precision", 'is "bfloat16", for which onnxruntime has no kernels on a CPU; use "float32"'
        if name not in QUANTIZED and part.scheme != "none":
            yield f"{key}.scheme", f'is "{part.scheme}"; {name} is not quantized, use "none"'
        if name not in QUANTIZED and part.attention != "none":
            yield f"{key}.attention", f'is "{part.attention}"; {name} is not quantized, use "none"'
        if part.attention == "fp8" and capability is not None and _version(capability) < _version(FP8_CAPABILITY):
            why = f'is "fp8", which needs compute capability {FP8_CAPABILITY} or later, not {gpu}'
            yield f"{key}.attention", f'{why}; use "none"'
        if part.scheme == "fp8" and capability is not None and _version(capability) < _version(FP8_CAPABILITY):
            why = f'is "fp8", which needs compute capability {FP8_CAPABILITY} or later, not {gpu}'
            yield f"{key}.scheme", f'{why}; use "int8-smooth" or "none"'
        if not recipe.backends_of(name):
            yield "backends", f"has none that runs {name}; add onnxruntime, tensorrt or tensorrt-rtx"
    for backend in recipe.backends:
        if capability is None and backend.startswith("tensorrt"):
            yield "backends", f"has {backend}, which needs a GPU; set compute_capability or use onnxruntime"
    if recipe.limits.build_workspace_gib > recipe.memory_gib:
        yield "limits.build_workspace_gib", f"is more than memory_gib ({recipe.memory_gib:g}); lower it"
    for dimension in ("batch", "references", "prompt_tokens"):
        span: Range = getattr(shapes, dimension)
        if not span.min <= span.opt <= span.max:
            yield f"shapes.{dimension}", f"is {inline(span)}; it must hold min <= opt <= max"
    if shapes.references.max > REFERENCES_MAX:
        yield "shapes.references.max", f"is {shapes.references.max}; the models take at most {REFERENCES_MAX} images"
    if not shapes.aspect_ratios:
        yield "shapes.aspect_ratios", 'is empty; it needs at least one, like "1:1"'
    if not recipe.schedules:
        yield "schedules", "is empty; the first schedule is the default of qie run, so give at least one"
    for index, schedule in enumerate(recipe.schedules):
        missing = [] if schedule.sizes == "all" else [s for s in schedule.sizes if s not in shapes.aspect_ratios]
        if missing or not schedule.sizes:
            what = f"has {', '.join(missing)}, not in shapes.aspect_ratios" if missing else "is empty"
            yield f"schedules[{index}].sizes", f'{what}; name some of those or "all"'


def _version(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
