"""What must hold between the fields of a manifest: whatever a manifest says, an edit computes with it or is refused.

Each number is within its own range already (``qie.engines.bundle.specs``).
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from qie.engines.bundle import modulation_rows
from qie.engines.bundle.manifest import Component, EngineRecord, Manifest, ModelRecord, ModulationRecord, TensorSpec
from qie.engines.bundle.specs import SIDE_MULTIPLE, SchedulerSpec, ShapeLimits, VisionSpec

__all__ = ["TENSORS", "check_manifest", "check_vision"]

Dims = tuple[int | str, ...]

TENSORS: dict[Component, tuple[dict[str, Dims], dict[str, Dims]]] = {
    "vision": (
        {"patches": ("patches", "P"), "window_ids": ("patches",), "image_ids": ("patches",),
         "rotary_cos": ("patches", "V"), "rotary_sin": ("patches", "V"), "raster_index": ("image_tokens",)},
        {"image_embeds": ("image_tokens", "D")},
    ),
    "language": (
        {"input_ids": ("batch", "prompt_tokens"), "image_embeds": ("image_tokens", "D"),
         "image_index": ("batch", "prompt_tokens"), "position_ids": (3, "batch", "prompt_tokens")},
        {"prompt_embeds": ("batch", "text_tokens", "D")},
    ),
    "vae_encoder": ({"image": ("batch", "height", "width", 3)}, {"latents": ("batch", "rows", "columns", "C")}),
    "transformer": (
        {"latents": ("batch", "noise_tokens", "C"), "reference": ("batch", "reference_tokens", "C"),
         "prompt_embeds": ("batch", "text_tokens", "D"), "rotary_cos": ("tokens", "R"), "rotary_sin": ("tokens", "R"),
         "modulation": ("steps_of_blocks", "M"), "modulation_out": ("steps", "O"), "dsigma": ("steps",),
         "step": ("batch",), "negative_velocity": ("batch", "noise_tokens", "C"), "guidance": ("batch",)},
        {"velocity": ("batch", "noise_tokens", "C"), "latents_next": ("batch", "noise_tokens", "C")},
    ),
    "vae_decoder": ({"latents": ("batch", "rows", "columns", "C")}, {"image": ("batch", "height", "width", 3)}),
}  # fmt: skip
"""Inputs and outputs of every component. Names of dims in lower case are free at run time; the others are fixed: D
width of the language model, C channels of a token, P values of a patch, V R rotary channels, M O sizes of the
modulation."""


_FLOATS = ("float32", "bfloat16")
_INDICES = ("window_ids", "image_ids", "raster_index", "input_ids", "image_index", "position_ids", "step")
_HIDDEN: dict[str, set[int | str]] = {
    "language": {"batch", "prompt_tokens"},
    "transformer": {"batch", "latent_tokens", "text_tokens"},
}
"""Component that may be in parts -> free dims of the hidden states between these; their last dim is fixed."""

_INTEGERS = {"image": ("uint8",), **dict.fromkeys(_INDICES, ("int64",))}
"""dtypes of the tensors that hold whole numbers; all others are ``_FLOATS``."""


def check_manifest(manifest: Manifest) -> None:
    """Check what must hold between the fields of ``manifest``.

    Raises:
        ValueError: something does not; the text names the place and what was found.
    """
    model, limits = manifest.model, manifest.limits
    _check_limits(limits)
    check_vision(model.vision)
    _check_scheduler(model.scheduler, manifest.defaults.steps)
    _require(model.vision.merge_size == model.prompt.merge_size, "merge_size of vision and prompt differ")
    _require(all(dims % 2 == 0 for dims in model.rotary.axes_dims), f"axes_dims are {model.rotary.axes_dims}, not even")
    _check_modulation(model.modulation)
    _check_files(manifest)
    fixed = _fixed_dims(model)
    targets: dict[tuple[str, str, str], list[EngineRecord]] = defaultdict(list)
    for engine in manifest.engines:
        targets[engine.component, engine.backend, engine.compute_capability].append(engine)
    for engines in targets.values():
        if any(engine.part > 0 or _is_first_part(engine) for engine in engines):
            _check_parts(sorted(engines, key=lambda engine: engine.part), fixed)
        else:
            for engine in engines:
                _check_tensors(engine, fixed)


def _check_limits(limits: ShapeLimits) -> None:
    _require(bool(limits.buckets), "limits.buckets is empty")
    _require(limits.min_side <= limits.max_side, f"limits.min_side is {limits.min_side}, above max_side")
    for size in limits.buckets:
        sides = (size.width, size.height)
        fits = limits.min_side <= min(sides) and max(sides) <= limits.max_side and size.area <= limits.max_area
        _require(fits and not any(side % SIDE_MULTIPLE for side in sides), f"the bucket {size} is outside the limits")


def check_vision(vision: VisionSpec) -> None:
    """Check what must hold between the constants of a vision tower.

    Raises:
        ValueError: something does not.
    """
    unit = vision.patch_size * vision.merge_size
    _require(vision.window_size >= unit, f"vision.window_size is {vision.window_size}, expected at least {unit}")
    _require(vision.head_dim % 4 == 0, f"vision.head_dim is {vision.head_dim}, expected a multiple of 4")
    _require(vision.min_pixels <= vision.max_pixels, f"vision.min_pixels is {vision.min_pixels}, above max_pixels")


def _check_scheduler(scheduler: SchedulerSpec, steps: int) -> None:
    _require(
        scheduler.base_image_seq_len < scheduler.max_image_seq_len, "scheduler.base_image_seq_len is not below max"
    )
    _require(steps <= scheduler.num_train_timesteps, f"defaults.steps is {steps}, above num_train_timesteps")


def _check_modulation(record: ModulationRecord) -> None:
    if record.file is None:
        _require(not record.tensors, "modulation.tensors are listed, and there is no file of them")
        return
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in modulation_rows.linears(record.layers, record.width).items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    _require({t.name: t.shape for t in record.tensors} == expected, "modulation.tensors are not those of its layers")
    end = 0
    for tensor in sorted(record.tensors, key=lambda tensor: tensor.offset):
        size = 2 if tensor.dtype == "bfloat16" else 4
        _require(end <= tensor.offset, f"modulation.{tensor.name} overlaps another tensor")
        end = tensor.offset + math.prod(tensor.shape) * size
        _require(
            tensor.offset % size == 0 and end <= record.file.bytes, f"modulation.{tensor.name} is outside its file"
        )


def _check_files(manifest: Manifest) -> None:
    described = [engine.structure for engine in manifest.engines]
    opened = [(e.component, e.path, e.files) for e in manifest.engines]
    opened += [(g.component, g.path, g.files) for g in manifest.graphs]
    every = [manifest.tokenizer, *manifest.schedules]
    for component, path, files in opened:
        _require(any(file.path == path for file in files), f"{component} is opened from {path!r}, none of its files")
        every += files
    others = (manifest.model.modulation.file, manifest.calibration, *described)
    every += [file for file in others if file is not None]
    known: dict[str, str] = {}
    for file in every:
        _require(known.setdefault(file.path, file.sha256) == file.sha256, f"{file.path} has two digests")


def _fixed_dims(model: ModelRecord) -> dict[str, int]:
    vision, modulation = model.vision, model.modulation
    return {
        "C": 4 * model.latent_channels,
        "P": 3 * vision.temporal_patch_size * vision.patch_size**2,
        "V": vision.head_dim // 2,
        "R": sum(model.rotary.axes_dims) // 2,
        "L": modulation.layers,
        "M": modulation_rows.rows(references=modulation.zero_cond_t) * modulation.width,
        "O": 2 * modulation.width,
    }


def _is_first_part(engine: EngineRecord) -> bool:
    """Whether the outputs of ``engine`` are hidden states."""
    _, outputs = TENSORS[engine.component]
    return all(spec.name not in outputs and _is_hidden(engine, spec) for spec in engine.outputs)


def _is_hidden(engine: EngineRecord, spec: TensorSpec) -> bool:
    *free, width = spec.dims or ("",)
    return isinstance(width, int) and set(free) <= _HIDDEN.get(engine.component, set()) and spec.dtype in _FLOATS


def _check_parts(engines: Sequence[EngineRecord], fixed: dict[str, int]) -> None:
    """Compare the parts of a component, in order, with ``TENSORS``; whoever chooses engines says which part is missing.

    A part reads inputs of the component and what the part before it makes, and makes outputs of the component or hidden
    states.
    """
    component, numbers = engines[0].component, [engine.part for engine in engines]
    _require(len(set(numbers)) == len(numbers), f"{component} has two engines of one part")
    inputs, outputs = TENSORS[component]
    made: dict[str, TensorSpec] = {}
    read: set[str] = set()
    for engine in engines:
        names = [spec.name for spec in (*engine.inputs, *engine.outputs)]
        _require(len(set(names)) == len(names), f"{component} has the tensors {', '.join(names)}")
        for spec in engine.inputs:
            if spec.name in inputs:
                _check_dims(component, spec, inputs[spec.name], fixed)
            elif engine.part - 1 in numbers:
                _require(made.get(spec.name) == spec, f"{component} reads {spec.name}, which the part before lacks")
        read |= set(names)
        made = {spec.name: spec for spec in engine.outputs}
        for spec in engine.outputs:
            if spec.name in outputs:
                _check_dims(component, spec, outputs[spec.name], fixed)
            else:
                _require(_is_hidden(engine, spec), f"{component} makes {spec.name} as {list(spec.dims)}")
        _check_profiles(engine)
    if numbers == [*range(len(numbers))] and outputs.keys() <= made.keys():
        missing = (inputs.keys() | outputs.keys()) - read
        _require(not missing, f"{component} has no tensor {', '.join(sorted(missing))}")


def _check_tensors(engine: EngineRecord, fixed: dict[str, int]) -> None:
    """Compare an engine's tensors with ``TENSORS``; D is taken from the first engine and must be the same in all."""
    for specs, expected in zip((engine.inputs, engine.outputs), TENSORS[engine.component], strict=True):
        found = {spec.name: spec for spec in specs}
        names = sorted(spec.name for spec in specs)
        _require(names == sorted(expected), f"{engine.component} has the tensors {', '.join(names)}")
        for name, dims in expected.items():
            _check_dims(engine.component, found[name], dims, fixed)
    _check_profiles(engine)


def _check_profiles(engine: EngineRecord) -> None:
    inputs = {spec.name: spec for spec in engine.inputs}
    for profile in engine.profiles:
        free = inputs[profile.input].dims if profile.input in inputs else ()
        lengths = {len(profile.min), len(profile.opt), len(profile.max), len(free)}
        ordered = all(a <= b <= c for a, b, c in zip(profile.min, profile.opt, profile.max, strict=False))
        _require(
            len(lengths) == 1 and ordered, f"{engine.component} has a profile for {profile.input!r} that fits none"
        )


def _check_dims(component: str, spec: TensorSpec, dims: Dims, fixed: dict[str, int]) -> None:
    if "D" in dims and len(spec.dims) == len(dims) and isinstance(width := spec.dims[dims.index("D")], int):
        fixed.setdefault("D", width)
    kinds = _INTEGERS.get(spec.name, _FLOATS)
    _require(spec.dtype in kinds, f"{component}: {spec.name} is {spec.dtype}, expected {' or '.join(kinds)}")
    wanted = tuple(fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)
    _require(spec.dims == wanted, f"{component}: {spec.name} is {list(spec.dims)}, expected {list(wanted)}")


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)
