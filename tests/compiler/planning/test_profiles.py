"""Profiles: the published models' in numbers, and that whatever the editor makes of an edit fits into them."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import write_graph_of
from qie.compiler.planning.profiles import profiles
from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Range, Recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS, Component, ProfileRecord
from qie.engines.inputs.prepare import output_size
from qie.engines.inputs.sizes import resolve_size
from qie.engines.inputs.vision import smart_resize

Of = Callable[[str], Model]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Of:
    """Models by the name of their architecture."""
    folder, made = tmp_path_factory.mktemp("profiles"), {}

    def find(name: str) -> Model:
        if name not in made:
            write_checkpoint(folder / name, ARCHITECTURES[name], weights=False)
            made[name] = open_checkpoint(str(folder / name), weights=False).model
        return made[name]

    return find


def shapes(component: Component, recipe: Recipe, model: Model) -> dict[str, ProfileRecord]:
    """The profile of every input by its name."""
    found = profiles(write_graph_of(component, model, recipe), recipe, model)
    assert len({p.input for p in found}) == len(found)
    return {p.input: p for p in found}


def test_the_published_transformer(model_of: Of) -> None:
    found = shapes("transformer", load_recipe("l40s"), model_of("qwen-image-edit-2511"))
    assert list(found) == [
        "latents", "reference", "prompt_embeds", "rotary_cos", "rotary_sin", "modulation", "modulation_out", "dsigma",
        "step", "negative_velocity", "guidance",
    ]  # fmt: skip
    # 1024 x 1024 pixels are 4096 tokens, 128 x 128 are 64; the largest bucket has a few more than the first.
    latents, reference, prompt, cos = (found[name] for name in ("latents", "reference", "prompt_embeds", "rotary_cos"))
    most = load_recipe("l40s").shape_limits(1024 * 1024).max_area // 256
    assert (latents.min, latents.opt, latents.max) == ((1, 64, 64), (1, 4096, 64), (4, most, 64))
    assert (reference.opt, reference.max[0]) == ((1, 4096, 64), 4)
    assert 3 * 4096 <= reference.max[1] <= 3 * 4096 * 1.05
    assert (prompt.min, prompt.opt, prompt.max) == ((1, 8, 3584), (1, 256, 3584), (4, 2560, 3584))
    assert cos.opt == (4096 + 4096 + 256, 64)
    # A step is one row of the tables of all 60 blocks; the schedule may have any number of them.
    modulation, step = found["modulation"], found["step"]
    assert (modulation.min[0], modulation.opt[0], modulation.max[0]) == (60, 40 * 60, 1000 * 60)
    assert (step.min, step.opt, step.max) == ((1,), (1,), (4,))
    assert cos.max == (latents.max[1] + reference.max[1] + prompt.max[1], 64)
    assert cos.min == (latents.min[1] + reference.min[1] + prompt.min[1], 64)


def test_the_published_encoders(model_of: Of) -> None:
    """What the vision tower sees has 384 x 384 pixels, 28 x 28 patches or 196 tokens; the Edit model's 1024 x 1024."""
    recipe = load_recipe("l40s")
    plus, edit = model_of("qwen-image-edit-2511"), model_of("qwen-image-edit")
    assert shapes("vision", recipe, plus)["patches"].opt == (784, 1176)
    assert shapes("vision", recipe, plus)["raster_index"].opt == (196,)
    assert shapes("vision", recipe, edit)["patches"].opt == (5476, 1176)
    assert shapes("language", recipe, plus)["input_ids"].opt == (1, 64 + 256)
    assert shapes("language", recipe, edit)["input_ids"].opt == (1, 64 + 1369 + 60)
    assert shapes("language", recipe, edit)["image_embeds"].max[0] < 2 * 1369  # one image, whatever the recipe says
    image = shapes("vae_encoder", recipe, plus)["image"]
    assert (image.min, image.opt, image.max) == ((1, 128, 128, 3), (1, 1024, 1024, 3), (1, 1568, 1568, 3))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", ["tiny", "tiny-edit", "demo", "qwen-image-edit", "qwen-image-edit-2511"])
def test_a_profile_is_in_order_and_has_every_free_dim(model_of: Of, component: Component, name: str) -> None:
    model, recipe = model_of(name), small(load_recipe("a100"))
    graph = write_graph_of(component, model, recipe)
    free = [spec for spec in graph.inputs if any(isinstance(dim, str) for dim in spec.dims)]
    found = profiles(graph, recipe, model)
    assert [p.input for p in found] == [spec.name for spec in free]
    sizes: dict[str, tuple[int, int, int]] = {}
    for spec, profile in zip(free, found, strict=True):
        for dim, low, tuned, high in zip(spec.dims, profile.min, profile.opt, profile.max, strict=True):
            assert 1 <= low <= tuned <= high
            if isinstance(dim, str):
                assert sizes.setdefault(dim, (low, tuned, high)) == (low, tuned, high)
            else:
                assert (low, tuned, high) == (dim, dim, dim)


def small(recipe: Recipe) -> Recipe:
    """The recipe for models of small areas too."""
    return replace(recipe, shapes=replace(recipe.shapes, min_side=32))


@pytest.mark.parametrize("name", ["tiny", "tiny-edit", "demo", "qwen-image-edit", "qwen-image-edit-2511"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_the_editor_makes_fits(model_of: Of, name: str, scale: float) -> None:
    """Images of any aspect ratio up to that of the recipe's flattest bucket, results of any size within the limits."""
    model = model_of(name)
    recipe = small(load_recipe("l40s"))
    recipe = replace(recipe, shapes=replace(recipe.shapes, area_scale_max=scale))
    areas, limits, vision = model.areas, model.limits(recipe), model.processor
    found = {component: shapes(component, recipe, model) for component in COMPONENTS}
    rng = random.Random(0)
    for _ in range(2000):
        number = 1 if model.pipeline == "edit" else rng.randint(1, 3)
        patches = reference_tokens = 0
        for _ in range(number):
            image = (round(1000 * 2 ** rng.uniform(-1.222, 1.222)), 1000)  # up to 21:9
            width, height = output_size(image, areas.vae_area)
            reference_tokens += width * height // 256
            check(found["vae_encoder"], image=(1, height, width, 3))
            seen = output_size(image, areas.condition_area or areas.vae_area)
            rows, columns = smart_resize(
                seen[1], seen[0], factor=28, min_pixels=vision.min_pixels, max_pixels=vision.max_pixels
            )
            patches += rows * columns // 14**2
        size, _ = resolve_size(limits, rng.randint(16, 2 * limits.max_side), rng.randint(16, 2 * limits.max_side))
        batch, noise_tokens, image_tokens = rng.randint(1, limits.batch_max), size.area // 256, patches // 4
        text_tokens = rng.randint(min(image_tokens + 12, limits.prompt_tokens_max), limits.prompt_tokens_max)
        check(found["vision"], patches=(patches, 1176), raster_index=(image_tokens,))
        check(found["language"], input_ids=(1, 64 + text_tokens), position_ids=(3, 1, 64 + text_tokens))
        check(
            found["transformer"],
            latents=(batch, noise_tokens, 64),
            reference=(batch, reference_tokens, 64),
            prompt_embeds=(batch, text_tokens, found["transformer"]["prompt_embeds"].opt[2]),
            rotary_cos=(text_tokens + noise_tokens + reference_tokens, found["transformer"]["rotary_cos"].opt[1]),
        )
        check(found["vae_decoder"], latents=(1, size.height // 16, size.width // 16, 64))


def check(found: dict[str, ProfileRecord], **wanted: tuple[int, ...]) -> None:
    for name, shape in wanted.items():
        ends = zip(found[name].min, shape, found[name].max, strict=True)
        assert all(low <= size <= high for low, size, high in ends), (name, shape, found[name])


def test_the_recipe_decides(model_of: Of) -> None:
    recipe, model = load_recipe("l40s"), model_of("qwen-image-edit-2511")
    changed = replace(
        recipe.shapes,
        batch=Range(min=2, opt=3, max=5),
        references=Range(min=2, opt=2, max=2),
        prompt_tokens=Range(min=20, opt=30, max=400),
        min_side=256,
        aspect_ratios=("3:4",),
    )
    found = shapes("transformer", replace(recipe, shapes=changed), model)
    assert found["latents"].min == (2, 256, 64)
    assert found["latents"].opt == (3, 896 * 1184 // 256, 64)
    assert found["reference"].opt == (3, 2 * 4096, 64)
    assert found["prompt_embeds"].min[1] == 20
    assert found["prompt_embeds"].opt[1] == 400  # two images and an instruction are more than 30 tokens, and than 400
    assert shapes("vae_decoder", replace(recipe, shapes=changed), model)["latents"].max[0] == 1
    assert shapes("language", replace(recipe, shapes=changed), model)["input_ids"].max == (1, 464)
