"""Estimates: the published 2511 against the field's arithmetic, what fits and what is refused."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from qie.compiler.planning.cost import cost
from qie.compiler.planning.estimate import REACHABLE, Estimate, estimate
from qie.compiler.planning.fit import check_fit, refusal
from qie.compiler.planning.gpus import GPUS
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.profiles import largest_dims, profiles
from qie.compiler.planning.workload import largest_sizes, sizes_of, workload
from qie.compiler.recipe.load import load_recipe, recipe_names
from qie.compiler.recipe.schema import BackendName, ComponentRecipe, Components, Recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.errors import BuildError, RecipeError, RequestError
from tests.support.bundles import planned

Qie = Callable[..., CompletedProcess[str]]

GIB = 2**30
TOKENS, WIDTH, BLOCKS = 4096, 3072, 60
"""Of one image at 1024 x 1024, and of the published transformer."""

L40S = replace(
    load_recipe("l40s"),
    components=Components(),
    backends=("tensorrt-rtx",),
    residency="resident",
    memory_gib=48,
    limits=replace(load_recipe("l40s").limits, build_workspace_gib=8),
    shapes=replace(load_recipe("l40s").shapes, batch=replace(load_recipe("l40s").shapes.batch, max=4)),
)
"""The L40S in bfloat16 with settings of its own, so that the shipped recipe may change."""


def plan_of(folder: Path, recipe: Recipe = L40S) -> Plan:
    """The plan of a build that may use 64 GiB, where nothing is too large for one part."""
    return planned(folder, folder / "bundle", recipe, weights=False, memory_gib=64)


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "2511"
    return write_checkpoint(folder, ARCHITECTURES["qwen-image-edit-2511"], weights=False)


@pytest.fixture(scope="module")
def plan(published_folder: Path) -> Plan:
    return plan_of(published_folder)


@pytest.fixture(scope="module")
def published(plan: Plan) -> Estimate:
    return estimate(plan)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", ARCHITECTURES["tiny"], weights=False)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Plan:
    return plan_of(tiny_folder, replace(L40S, shapes=replace(L40S.shapes, min_side=32)))


def of(found: Estimate, component: str) -> Any:
    return next(c for c in found.components if c.component == component)


# The published model (the arithmetic of the project's notes on the field)


def test_the_default_edit_of_2511(plan: Plan, published: Estimate) -> None:
    work = published.workload
    assert (str(work.size), work.references, work.steps, work.guidance, work.passes) == ("1024x1024", 1, 40, 4.0, 2)
    assert sizes_of(plan, work)["transformer"] == {
        "batch": 1,
        "steps": 40,
        "steps_of_blocks": 40 * 60,
        "noise_tokens": TOKENS,
        "reference_tokens": TOKENS,
        "latent_tokens": 2 * TOKENS,
        "text_tokens": 256,
        "tokens": 2 * TOKENS + 256,
    }
    assert sizes_of(plan, work)["vision"] == {"patches": 784, "image_tokens": 196}
    language = {"batch": 1, "prompt_tokens": 64 + 256, "text_tokens": 256, "image_tokens": 196}
    assert sizes_of(plan, work)["language"] == language


def test_a_forward_of_2511(published: Estimate) -> None:
    """164 TFLOP: 111 in products, 53 in attention."""
    forward = of(published, "transformer").cost
    assert forward.flops("gemm") == pytest.approx(111e12, rel=0.05)
    assert forward.flops("attention") == pytest.approx(53e12, rel=0.05)
    assert forward.flops() == pytest.approx(164e12, rel=0.05)
    assert {work.dtype for work in forward.work} == {"bfloat16"}


def test_an_image_token_of_2511(plan: Plan, published: Estimate) -> None:
    """13.6 GFLOP of products."""
    graph = next(p.graph for p in plan.components if p.component == "transformer")
    sizes = sizes_of(plan, published.workload)["transformer"]
    more = {name: sizes[name] + 512 for name in ("noise_tokens", "reference_tokens")} | {
        "tokens": sizes["tokens"] + 1024
    }
    added = cost(graph, sizes | more).flops("gemm") - of(published, "transformer").cost.flops("gemm")
    assert added / 1024 == pytest.approx(13.6e9, rel=0.05)


def test_an_edit_of_2511(published: Estimate) -> None:
    """40 steps with guidance are 13.1 PFLOP: at 60 % of peak about 60 s on an L40S, 70 s on an A100."""
    assert of(published, "transformer").runs == 80
    assert published.flops == pytest.approx(13.1e15, rel=0.05)
    assert published.seconds is not None
    assert published.seconds / REACHABLE == pytest.approx(60, rel=0.05)
    assert published.flops / (REACHABLE * GPUS["A100 80GB"].tflops["bfloat16"] * 1e12) == pytest.approx(70, rel=0.05)


def test_what_the_last_block_leaves_out_is_less_than_a_hundredth(published: Estimate) -> None:
    forward = of(published, "transformer").cost
    tokens = 2 * TOKENS + 256
    ends = 2 * WIDTH * (2 * TOKENS * 64 + 256 * 3584 + TOKENS * 64)
    products = BLOCKS * 24 * WIDTH**2 * tokens + ends
    attention = BLOCKS * 4 * WIDTH * tokens**2
    assert 0.99 * products < forward.flops("gemm") < products
    assert 0.99 * attention < forward.flops("attention") < attention


def test_the_weights_of_2511(published: Estimate) -> None:
    """13.6 of the transformer's 20.4 billion parameters stay, and 7 billion of the language model; two bytes each."""
    assert of(published, "transformer").weights_bytes == pytest.approx(2 * 13.6e9, rel=0.02)
    assert of(published, "language").weights_bytes == pytest.approx(2 * 7.07e9, rel=0.02)


def test_the_largest_edit_of_2511(plan: Plan) -> None:
    largest = largest_sizes(plan, 4)
    assert largest["transformer"]["batch"] == 4
    assert largest["vae_decoder"]["batch"] == 1
    assert largest["transformer"]["reference_tokens"] >= 3 * TOKENS
    assert largest["transformer"]["text_tokens"] == 2560
    assert largest["vision"]["patches"] >= 3 * 784


def test_memory_grows_with_what_the_recipe_allows(plan: Plan, published: Estimate) -> None:
    found = {4: published}
    for batch in (2, 3):
        shapes = replace(plan.recipe.shapes, batch=replace(plan.recipe.shapes.batch, max=batch))
        found[batch] = estimate(changed(plan, shapes=shapes))
    two, three, four = (of(found[batch], "transformer").largest_activation_bytes for batch in (2, 3, 4))
    assert four - three == pytest.approx(three - two, rel=0.05)
    assert four > 1.5 * two
    assert len({of(each, "vae_decoder").largest_activation_bytes for each in found.values()}) == 1
    assert [c.cost for c in published.components] == [c.cost for c in found[2].components]


def test_memory_is_that_of_the_profiles(tiny: Plan) -> None:
    """What the compiler reserves depends on the largest size of every dim, also where no edit has all of them."""
    decoder = next(p for p in tiny.components if p.component == "vae_decoder")
    dims = largest_dims("vae_decoder", tiny.recipe, tiny.model)
    (profile,) = profiles(decoder.graph, tiny.recipe, tiny.model)
    assert profile.max[:3] == (1, dims["rows"], dims["columns"])
    assert dims["rows"] * dims["columns"] > math.prod(largest_sizes(tiny, 4)["vae_decoder"].values())
    expected = cost(decoder.graph, dims, compiled=True).activation_bytes
    assert of(estimate(tiny), "vae_decoder").largest_activation_bytes == expected


def test_the_tables_of_every_step_lie_on_the_card(tiny: Plan) -> None:
    """Those of the recipe's longest schedule, or of the edit where it is longer."""
    row = 2 * (ARCHITECTURES["tiny"].num_layers * 18 * 64 + 2 * 64) + 4  # tables in bfloat16, dsigma in float32
    taken = {steps: estimate(tiny, workload(tiny, steps=steps)) for steps in (4, 40, 43)}
    sizes = [of(found, "transformer").largest_io_bytes for found in taken.values()]
    assert [size - sizes[0] for size in sizes] == [0, 0, 3 * row]
    graph = next(p.graph for p in tiny.components if p.component == "transformer")
    largest = largest_dims("transformer", tiny.recipe, tiny.model) | {
        "steps": 1,
        "steps_of_blocks": ARCHITECTURES["tiny"].num_layers,
    }
    assert sizes[0] == cost(graph, largest).io_bytes + 39 * row


# What fits


def changed(plan: Plan, **keys: Any) -> Plan:
    limits = {name: keys.pop(name) for name in ("build_workspace_gib",) if name in keys}
    memory = keys.pop("memory", plan.memory)
    recipe = replace(plan.recipe, limits=replace(plan.recipe.limits, **limits), **keys)
    return replace(plan, recipe=recipe, memory=memory)


def on(found: Estimate, **keys: Any) -> Estimate:
    """The same engines with other limits."""
    return replace(found, plan=changed(found.plan, **keys))


def test_all_engines_together_must_fit_where_they_are_resident(published: Estimate) -> None:
    weights = sum(c.weights_bytes for c in published.components)
    most = max(c.largest_activation_bytes + c.largest_io_bytes for c in published.components)
    assert published.gpu_bytes == weights + most
    assert refusal(published) is None
    refused = refusal(on(published, memory_gib=40))
    assert isinstance(refused, RecipeError)
    text = str(refused)
    assert f"all weights {weights / GIB:.1f} GiB + activations of " in text
    assert f"= {published.gpu_bytes / GIB:.1f} GiB, and the recipe's memory_gib is 40; " in text
    assert 'residency = "sequential"' in text
    assert refusal(on(published, memory_gib=40, residency="sequential")) is None


def test_the_largest_engine_must_fit_where_they_take_turns(published: Estimate) -> None:
    small = on(published, memory_gib=24, residency="sequential")
    transformer = of(small, "transformer")
    assert small.gpu_bytes == transformer.weights_bytes + transformer.working_bytes
    refused = refusal(small)
    assert isinstance(refused, RecipeError)
    assert re.search(r"weights of transformer 25\.2 GiB \+ .* memory_gib is 24; ", str(refused))


def test_a_limit_is_reached_and_not_only_passed(published: Estimate) -> None:
    exact = published.gpu_bytes / GIB
    assert refusal(on(published, memory_gib=exact)) is None
    assert refusal(on(published, memory_gib=exact - 1e-6)) is not None
    assert refusal(on(published, memory=published.host_bytes)) is None
    assert refusal(on(published, memory=published.host_bytes - 1)) is not None


def test_building_must_fit_into_the_host(published: Estimate) -> None:
    """1.6 times the weights, streamed: measured for up to 4.76 GB of them (7.74 GB)."""
    transformer = of(published, "transformer")
    assert transformer.host_bytes == pytest.approx(1.6 * transformer.weights_bytes, rel=0.01)
    assert published.host_bytes == transformer.host_bytes
    refused = refusal(on(published, memory=3 * GIB))
    assert isinstance(refused, BuildError)
    assert str(refused) == (
        "building language takes about 21.3 GiB of host memory, and 2.5 GiB in parts of one block each (0.2 GiB + 1.6 "
        "x 1.4 GiB), for weights of 13.2 GiB, and the build may use 3.0 GiB; build on a machine with more memory"
    )


def test_the_workspace_counts_where_the_compiler_takes_one(tiny: Plan) -> None:
    found, full = (estimate(built_by(tiny, backend)) for backend in ("tensorrt-rtx", "tensorrt"))
    assert full.gpu_bytes == found.gpu_bytes + 8 * GIB
    with pytest.raises(RecipeError, match=r"workspace 8\.0 GiB = .* lower limits\.build_workspace_gib"):
        check_fit(changed(built_by(tiny, "tensorrt"), memory_gib=8))
    check_fit(changed(built_by(tiny, "tensorrt-rtx"), memory_gib=8))


def built_by(plan: Plan, backend: BackendName, finish: BackendName | None = None) -> Plan:
    return replace(
        plan,
        components=tuple(replace(p, backend=backend, finish=finish, finish_bytes=p.bytes) for p in plan.components),
    )


def test_what_is_finished_elsewhere_counts_too(tiny: Plan) -> None:
    """The engine made here, the graph for the other one, and the other one's memory."""
    transformer = of(estimate(built_by(tiny, "tensorrt-rtx", finish="tensorrt")), "transformer")
    assert transformer.backend == "tensorrt"
    assert transformer.disk_bytes == 2 * transformer.weights_bytes
    assert transformer.host_bytes == 200_000_000 + int(2.1 * transformer.weights_bytes)


def test_the_estimate_takes_little_memory(published_folder: Path) -> None:
    script = (
        "import re, sys; from pathlib import Path; from qie.compiler.cli.app import app\n"
        "try: app(sys.argv[1:], standalone_mode=False)\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1], file=sys.stderr)"
    )
    words = [sys.executable, "-c", script, "plan", str(published_folder), "--gpu", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stderr.splitlines()[-1]) * 1024 < 600e6


# GPUs and edits


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_a_gpu_has_peak_rates(name: str) -> None:
    recipe = load_recipe(name)
    if recipe.compute_capability is None:
        assert recipe.gpu not in GPUS
        return
    peaks = GPUS[recipe.gpu]
    has_fp8 = float(recipe.compute_capability) >= 8.9
    assert set(peaks.tflops) == {"float32", "bfloat16", "int8"} | ({"float8_e4m3fn"} if has_fp8 else set())
    assert peaks.tflops["float32"] < peaks.tflops["bfloat16"] < peaks.tflops["int8"]


def test_peaks_of_the_notes() -> None:
    assert (GPUS["L40S"].tflops["bfloat16"], GPUS["L40S"].tflops["float8_e4m3fn"]) == (362, 733)
    assert (GPUS["A100 80GB"].tflops["bfloat16"], GPUS["A100 80GB"].tflops["int8"]) == (312, 624)
    assert (GPUS["H100 80GB"].tflops["bfloat16"], GPUS["H100 80GB"].tflops["float8_e4m3fn"]) == (989, 1979)


def test_time_is_the_longer_of_computing_and_moving(tiny: Plan, published: Estimate) -> None:
    language, transformer = of(published, "language"), of(published, "transformer")
    assert language.seconds == pytest.approx(2 * language.cost.moved_bytes / 864e9)
    assert transformer.seconds == pytest.approx(80 * transformer.cost.flops() / 362e12)
    assert estimate(changed(tiny, gpu="an unknown GPU")).seconds is None


def test_the_settings_of_an_edit(tiny: Plan) -> None:
    wide = workload(tiny, size=(205, 64), references=2, steps=8, guidance=1.0)
    assert (str(wide.size), wide.passes) == ("192x64", 1)
    assert "205x64" in wide.notes[0]
    assert [c.runs for c in estimate(tiny, wide).components] == [1, 1, 2, 8, 1]
    sizes = sizes_of(tiny, wide)
    assert sizes["transformer"]["noise_tokens"] == 192 * 64 // 256
    assert sizes["vae_decoder"] == {"batch": 1, "rows": 4, "columns": 12}
    assert sizes["vae_encoder"] == {"batch": 1, "height": 64, "width": 224}  # 128 x 128 pixels at that aspect ratio
    with pytest.raises(RequestError, match="1 to 3"):
        workload(tiny, references=4)


def test_the_first_generation_sees_one_large_image(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "edit", ARCHITECTURES["qwen-image-edit"], weights=False)
    plan = plan_of(folder)
    assert sizes_of(plan, workload(plan))["vision"]["image_tokens"] == 1369
    assert largest_sizes(plan, 4)["transformer"]["reference_tokens"] < 1.1 * TOKENS
    with pytest.raises(RequestError, match="1 to 1"):
        workload(plan, references=2)


@pytest.mark.soak
def test_eight_bits_are_counted(published_folder: Path) -> None:
    """Half the weights of what is quantized, and twice the rate where it is."""
    section = ComponentRecipe(scheme="fp8", exclude=("transformer_blocks.0.*",))
    plain, quantized = (
        estimate(plan_of(published_folder, replace(L40S, components=components))).components[3]
        for components in (Components(), Components(transformer=section))
    )
    assert plain.component == "transformer"
    share = (BLOCKS - 1) / BLOCKS
    assert quantized.weights_bytes == pytest.approx((1 - share / 2) * plain.weights_bytes, rel=0.01)
    assert quantized.cost.flops() == plain.cost.flops()
    gemm = {work.dtype: work.flops for work in quantized.cost.work if work.kind == "gemm"}
    assert gemm["float8_e4m3fn"] == pytest.approx(share * plain.cost.flops("gemm"), rel=0.02)
    assert plain.seconds is not None
    assert quantized.seconds is not None
    assert quantized.seconds < 0.75 * plain.seconds
