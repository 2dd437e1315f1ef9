"""The text encoder that a bundle has for vLLM: its files, what it shares, what a plan counts, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from qie.compiler.backends import BUILDERS
from qie.compiler.packing.export import export_graphs
from qie.compiler.planning.estimate import estimate
from qie.compiler.recipe.load import load_recipe, parse_recipe, with_backend
from qie.compiler.validation.rebuild import cpu_recipe
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS, GraphRecord
from qie.engines.errors import BuildError, BundleError, RecipeError
from qie.engines.inputs.prompt import PREFIX_TOKENS
from qie.engines.inputs.tokenizer import load_tokenizer
from qie.engines.sessions.vllm.settings import arguments, flags, read_settings
from tests.support.bundles import build, planned

LANGUAGE = 'extends = "cpu"\n[components.language]\nbackend = "vllm"\n'
BOTH = f'{LANGUAGE}[components.vision]\nbackend = "vllm"\n'


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(checkpoint, tmp_path_factory.mktemp("both") / "both", BOTH)


@pytest.fixture(scope="module")
def language(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(checkpoint, tmp_path_factory.mktemp("language") / "language", LANGUAGE)


def test_the_tensors_are_those_of_the_checkpoint_under_the_names_of_transformers_5(
    both: Bundle, checkpoint: Path
) -> None:
    with (
        safe_open(both.path / "text_encoder.vllm/model.safetensors", "pt") as written,
        safe_open(checkpoint / "text_encoder/model.safetensors", "pt") as original,
    ):
        names = {name for name in original.keys() if name != "lm_head.weight"}
        assert set(written.keys()) == names
        for name in names:
            np.testing.assert_array_equal(
                written.get_tensor(name).float().numpy(), original.get_tensor(name).float().numpy()
            )


def test_vision_and_language_share_the_files(both: Bundle) -> None:
    vision, language = (engine for engine in both.manifest.engines if engine.backend == "vllm")
    assert (vision.component, language.component) == ("vision", "language")
    assert vision.files == language.files and vision.path == language.path and vision.key != language.key
    assert {file.path for file in vision.files} == {
        f"text_encoder.vllm/{path.name}" for path in (both.path / "text_encoder.vllm").iterdir()
    }


def test_the_tower_is_left_out_where_another_backend_runs_vision(language: Bundle) -> None:
    folder = language.path / "text_encoder.vllm"
    with safe_open(folder / "model.safetensors", "pt") as written:
        assert not any(name.startswith("model.visual.") for name in written.keys())
    assert read_settings(folder / "qie.json").images == 0


def test_the_config_is_read_by_transformers(both: Bundle, checkpoint: Path) -> None:
    own = json.loads((both.path / "text_encoder.vllm/config.json").read_text())
    original = json.loads((checkpoint / "text_encoder/config.json").read_text())
    for table in ("text_config", "vision_config"):
        same = own[table].keys() & original.get(table, {}).keys() - {"dtype", "tie_word_embeddings"}
        assert {key: own[table][key] for key in same - _ROPE} == {key: original[table][key] for key in same - _ROPE}
    assert own["image_token_id"] == original["image_token_id"]
    tokenizer = load_tokenizer((both.path / "text_encoder.vllm/tokenizer.json").read_bytes())
    assert tokenizer.token_to_id("<|image_pad|>") == own["image_token_id"]


_ROPE = {"rope_scaling", "rope_parameters", "torch_dtype"}


def test_the_longest_prompt_is_that_of_the_recipe(both: Bundle) -> None:
    settings = read_settings(both.path / "text_encoder.vllm/qie.json")
    assert settings.positions == PREFIX_TOKENS + both.manifest.limits.prompt_tokens_max
    assert settings.images == both.manifest.limits.references_max


def test_a_plan_counts_every_tensor_once(both: Bundle, language: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    for bundle, recipe in ((both, BOTH), (language, LANGUAGE)):
        plan = planned(checkpoint, tmp_path / bundle.name, recipe)
        counted = sum(c.bytes for c in plan.components if c.in_text_encoder)
        size = (bundle.path / "text_encoder.vllm/model.safetensors").stat().st_size
        assert 0 < size - counted < 20_000  # the header


def test_a_plan_counts_the_key_value_cache(both: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    cache = read_settings(both.path / "text_encoder.vllm/qie.json").cache_bytes
    counted = {
        gpu: next(c for c in estimate(planned(checkpoint, tmp_path / "x", gpu)).components if c.component == "language")
        for gpu in ("cpu", LANGUAGE)
    }
    assert counted[LANGUAGE].largest_io_bytes - counted["cpu"].largest_io_bytes == cache


def test_a_plan_counts_vllm_itself_on_a_cpu(checkpoint: Path, tmp_path: Path) -> None:
    plain, with_vllm = (estimate(planned(checkpoint, tmp_path / "x", gpu)).gpu_bytes for gpu in ("cpu", LANGUAGE))
    assert 0.9e9 < with_vllm - plain < 1.2e9  # measured: 0.94 GB


def test_the_key_of_language_says_what_else_is_in_the_text_encoder(both: Bundle, language: Bundle) -> None:
    one, other = ({e.component: e.key for e in bundle.manifest.engines} for bundle in (both, language))
    assert one["language"] != other["language"] and one["transformer"] == other["transformer"]


def test_a_second_build_takes_the_text_encoder_over(both: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    first = build(checkpoint, tmp_path / "again", BOTH)
    inode = (first.path / "text_encoder.vllm/model.safetensors").stat().st_ino
    second = build(checkpoint, tmp_path / "again", BOTH)
    assert (second.path / "text_encoder.vllm/model.safetensors").stat().st_ino == inode
    assert second.manifest.engines == first.manifest.engines
    damaged = second.path / "text_encoder.vllm/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    third = build(checkpoint, tmp_path / "again", BOTH)
    assert [e.files for e in third.manifest.engines] == [e.files for e in first.manifest.engines]


def test_an_export_writes_it_beside_the_graphs_and_replaces_itself(
    both: Bundle, checkpoint: Path, tmp_path: Path
) -> None:
    plan = planned(checkpoint, tmp_path / "exported", BOTH)
    for _ in range(2):
        written = export_graphs(plan, weights=True)
    assert written[-1] == tmp_path / "exported/text_encoder.vllm/config.json"
    for file in both.manifest.engines[0].files:
        assert (tmp_path / "exported" / file.path).read_bytes() == (both.path / file.path).read_bytes()


def test_a_rebuild_for_the_cpu_takes_the_graph_of_every_component() -> None:
    recipe = load_recipe("l40s-vllm")
    assert recipe.backends_of("vision")[0] == recipe.backends_of("language")[0] == "vllm"
    assert {cpu_recipe(recipe).backends_of(component) for component in COMPONENTS} == {("onnxruntime",)}


@pytest.mark.parametrize("name", ["model.safetensors", "qie.json"])
def test_a_damaged_text_encoder_is_not_built(name: str, both: Bundle, tmp_path: Path) -> None:
    shutil.copytree(both.path / "text_encoder.vllm", tmp_path / "text_encoder.vllm")
    (tmp_path / "text_encoder.vllm" / name).write_bytes(b"{}")
    with pytest.raises(BuildError, match="the text encoder for vllm is damaged .*; build the bundle again"):
        BUILDERS["vllm"].build(_graph(both, "vision"), tmp_path, key="0" * 64, recipe=load_recipe("cpu"))


def test_a_text_encoder_without_a_tower_is_no_engine_of_vision(both: Bundle, language: Bundle) -> None:
    with pytest.raises(BuildError, match="has no vision for"):
        BUILDERS["vllm"].build(_graph(both, "vision"), language.path, key="0" * 64, recipe=load_recipe("cpu"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"positions": 1}',
        '{"positions": 0, "images": 0, "cache_bytes": 1, "image_token_id": 1, "merge_size": 2}',
    ],
)
def test_settings_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "qie.json").write_text(text)
    with pytest.raises(BundleError, match="does not say how vLLM runs the text encoder"):
        read_settings(tmp_path / "qie.json")


def test_vision_runs_only_beside_language_in_the_same_precision(tmp_path: Path) -> None:
    text = 'extends = "cpu"\n[components.vision]\nbackend = "vllm"\n'
    with pytest.raises(RecipeError, match='is "vllm", which runs vision only beside language'):
        parse_recipe(text, tmp_path / "mine.toml")
    on_gpu = 'extends = "l40s"\n[components.language]\nbackend = "vllm"\nscheme = "none"\n'
    mixed = f'{on_gpu}[components.vision]\nbackend = "vllm"\nprecision = "float32"\n'
    with pytest.raises(RecipeError, match="runs vision only beside language in the same precision"):
        parse_recipe(mixed, tmp_path / "mine.toml")
    assert parse_recipe(mixed.replace("float32", "bfloat16"), tmp_path / "mine.toml").backends_of("vision")[0] == "vllm"


def test_other_components_and_schemes_are_refused() -> None:
    with pytest.raises(RecipeError, match="which runs only vision and language"):
        with_backend(load_recipe("cpu"), "transformer", "vllm")
    recipe = load_recipe("cpu")
    section = replace(recipe.components.language, scheme="w8a16")
    quantized = replace(recipe, components=replace(recipe.components, language=section))
    with pytest.raises(RecipeError, match="does not execute the scheme w8a16"):
        with_backend(quantized, "language", "vllm")


def test_the_script_starts_a_server_without_a_tower(both: Bundle) -> None:
    folder = both.path / "text_encoder.vllm"
    script = (folder / "serve.sh").read_text()
    assert (folder / "serve.sh").stat().st_mode & 0o111
    for flag in (
        "--enable-mm-embeds",
        "--no-enable-prefix-caching",
        "--no-enable-chunked-prefill",
        '"use_activation": false',
    ):
        assert flag in script
    assert """--limit-mm-per-prompt '{"image": 0, "video": 0}'""" in script
    words = flags(arguments(read_settings(folder / "qie.json"), "float32", images=0))
    assert all(word in script for word in words)


def _graph(bundle: Bundle, component: str) -> GraphRecord:
    engine = next(e for e in bundle.manifest.engines if e.component == component)
    return GraphRecord(
        component=engine.component,
        backend="vllm",
        precision="float32",
        key=engine.key,
        path=engine.path,
        files=engine.files,
        inputs=engine.inputs,
        outputs=engine.outputs,
        parameters=engine.parameters,
        profiles=(),
    )
