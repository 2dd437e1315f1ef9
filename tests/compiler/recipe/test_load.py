"""Reading recipes: strictness, inheritance and the messages that name file and key."""

import dataclasses
import re
from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe
from qie.compiler.recipe.schema import Range, Recipe, Schedule, to_toml
from qie.engines.errors import RecipeError
from tests.support.recipes import GPU, refusal, write


def test_a_short_recipe_takes_every_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GPU))
    assert recipe == Recipe(gpu="Test GPU", compute_capability="8.9", memory_gib=24.0, backends=("tensorrt",))
    assert type(recipe.memory_gib) is float
    assert recipe.components["transformer"].precision == "bfloat16"
    assert recipe.schedules[0] == Schedule(steps=40, guidance=4.0, sizes="all")


def test_names_are_found_whatever_their_case() -> None:
    assert load_recipe("L40S") == load_recipe("l40s")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "l40",
            r'no recipe "l40"; use "l40s", or another of a100, a100-40gb, .*rtx5090, or the path of a \.toml file$',
        ),
        ("voodoo", r'no recipe "voodoo"; use one of a100, .*rtx5090, or the path of a \.toml file$'),
        ("", r'no recipe ""; use one of a100'),
        ("../recipes/cpu", r"no recipe"),
    ],
)
def test_an_unknown_name_lists_the_names(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*absent\.toml \(No such file"):
        load_recipe(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*folder\.toml \(Is a directory"):
        load_recipe(str(tmp_path / "folder.toml"))
    (tmp_path / "bytes.toml").write_bytes(b'gpu = "\xff"')
    with pytest.raises(RecipeError, match=r"bytes\.toml is not valid TOML"):
        load_recipe(str(tmp_path / "bytes.toml"))
    assert "FILE is not valid TOML" in refusal(tmp_path, "gpu = ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpuu = 1", 'unknown key "gpuu" in FILE; use "gpu"'),
        ('extend = "l40s"', 'unknown key "extend" in FILE; use "extends"'),
        ("[shapes]\nmin_sides = 64", 'unknown key "shapes.min_sides" in FILE; use "shapes.min_side"'),
        ("[shapes]\nbatch = { mx = 2 }", 'unknown key "shapes.batch.mx" in FILE; use "shapes.batch.max"'),
        ("[limitz]", 'unknown key "limitz" in FILE; use "limits"'),
        ("[components.vae]", 'unknown key "components.vae" in FILE; '),
        ("[limits]\nzzz = 1", 'unknown key "limits.zzz" in FILE; use one of build_workspace_gib, host_memory_gib'),
        (
            "[[schedules]]\nstep = 4\nguidance = 1.0",
            'unknown key "schedules[0].step" in FILE; use "schedules[0].steps"',
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, GPU + text)


@pytest.mark.parametrize(
    "text",
    [
        "schema = 1" + GPU,
        GPU + "[components.transformer]\nquantization = 'fp8'",
        GPU + "[components.transformer]\nkeep = ['transformer_blocks.0.*']",
        'extends = "l40s"\n[components.transformer]\nkeep = []',
    ],
)
def test_a_recipe_of_schema_1_is_refused_with_the_new_keys(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text) == (
        "FILE has schema 1, expected 2; rename the component keys quantization to scheme and keep to exclude, "
        "take the keys of [gates] from recipes/README.md and set schema to 2"
    )


@pytest.mark.parametrize("key", ["gpu", "memory_gib", "backends"])
def test_a_required_key_is_missed(tmp_path: Path, key: str) -> None:
    text = "\n".join(line for line in GPU.splitlines() if not line.startswith(key))
    assert f'the key "{key}" is missing in FILE' in refusal(tmp_path, text)


def test_a_required_key_of_a_schedule_is_missed(tmp_path: Path) -> None:
    assert 'the key "schedules[0].guidance" is missing' in refusal(tmp_path, GPU + "[[schedules]]\nsteps = 4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = 3", "schema in FILE is 3; set it to 2"),
        ("schema = true", "schema in FILE is true; set it to 2"),
        ("schema = 2.0", "schema in FILE is 2.0; set it to 2"),
        ("noise = 'float16'", 'noise in FILE is "float16"; set it to "float32" or "bfloat16"'),
        ("residency = 'loose'", 'residency in FILE is "loose"; set it to "resident" or "sequential"'),
        ("shapes = 3", "shapes in FILE is 3; set it to a table"),
        ("shapes = { batch = 3 }", "shapes.batch in FILE is 3; set it to a table"),
        ("schedules = 3", "schedules in FILE is 3; set it to an array"),
        ("schedules = [3]", "schedules[0] in FILE is 3; set it to a table"),
        ("extends = 3", 'extends in FILE is 3; set it to a string like "l40s"'),
        ("[shapes]\nmin_side = 100", "is 100; set it to a whole number from 16 to 4096 pixels, a multiple of 16"),
        ("[shapes]\nmin_side = 0", "set it to a whole number from 16 to 4096 pixels"),
        ("[shapes]\nmin_side = 64.0", "is 64.0; set it to a whole number"),
        ("[shapes]\nmin_side = true", "is true; set it to a whole number"),
        ("[shapes]\nbatch = { min = 0 }", "shapes.batch.min in FILE is 0; set it to a whole number from 1 to"),
        ("[shapes]\narea_scale_max = 0.5", "set it to a number from 1 to 16 times the model's area"),
        ("[shapes]\naspect_ratios = ['16x9']", 'shapes.aspect_ratios[0] in FILE is "16x9"; set it to a string like'),
        ("[shapes]\naspect_ratios = ['0:1']", "set it to a string like"),
        ("[shapes]\naspect_ratios = '1:1'", "set it to an array"),
        ("[limits]\nhost_memory_gib = -1", "limits.host_memory_gib in FILE is -1; set it to a number from 0.25 to"),
        ("[limits]\nhost_memory_gib = nan", "is nan; set it to a number"),
        ("[limits]\nhost_memory_gib = inf", "is inf; set it to a number"),
        (f"[limits]\nhost_memory_gib = {10**400}", "set it to a number from 0.25 to 4096 GiB"),
        ("[limits]\nhost_memory_gib = '32'", 'is "32"; set it to a number'),
        ("schedules = [{ steps = 4, guidance = 101 }]", "guidance in FILE is 101; set it to a number from 1 to 100"),
        ("[components.vision]\nprecision = 'fp16'", 'set it to "float32" or "bfloat16" or "float16"'),
        ("[components.vision]\nexclude = [1]", "components.vision.exclude[0] in FILE is 1; set it to a string"),
        ("[components.vision]\nexclude = [1979-05-27]", "exclude[0] in FILE is 1979-05-27; set it to a string"),
        ("schedules = [{ steps = 0, guidance = 1 }]", "schedules[0].steps in FILE is 0; set it to a whole number"),
        ("schedules = [{ steps = 4, guidance = 0.5 }]", "schedules[0].guidance in FILE is 0.5; set it to a number"),
        ("schedules = [{ steps = 4, guidance = 1, sizes = 'some' }]", 'is "some"; set it to "all"'),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(tmp_path: Path, text: str, message: str) -> None:
    tables_last = text + GPU if not text.startswith("[") else GPU + text
    assert message in refusal(tmp_path, tables_last)


def test_a_capability_is_a_string(tmp_path: Path) -> None:
    text = GPU.replace('"8.9"', "8.9")
    assert 'compute_capability in FILE is 8.9; set it to a string like "8.9"' in refusal(tmp_path, text)


def test_tables_merge_key_by_key_and_arrays_replace(tmp_path: Path) -> None:
    write(
        tmp_path,
        GPU
        + """
        [shapes]
        aspect_ratios = ["1:1", "4:3"]
        min_side = 64
        batch = { min = 2, opt = 3, max = 5 }
        [components.transformer]
        exclude = ["a", "b"]
        [[schedules]]
        steps = 30
        guidance = 2.0
        [[schedules]]
        steps = 4
        guidance = 1.0
        """,
        "base/base.toml",
    )
    child = """
        extends = "base/base.toml"
        gpu = "Child"
        [shapes]
        aspect_ratios = ["3:2"]
        batch = { max = 7 }
        [components.transformer]
        scheme = "fp8"
        [[schedules]]
        steps = 6
        guidance = 1.0
        """
    recipe = load_recipe(write(tmp_path, child))
    assert (recipe.gpu, recipe.memory_gib) == ("Child", 24.0)
    assert recipe.shapes.aspect_ratios == ("3:2",)
    assert recipe.shapes.min_side == 64
    assert recipe.shapes.batch == Range(min=2, opt=3, max=7)
    assert recipe.components.transformer.exclude == ("a", "b")
    assert recipe.components.transformer.scheme == "fp8"
    assert recipe.schedules == (Schedule(steps=6, guidance=1.0),)


def test_extends_a_shipped_recipe_even_under_its_own_name(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, 'extends = "l40s"\nmemory_gib = 40', "l40s.toml"))
    assert recipe == dataclasses.replace(load_recipe("l40s"), memory_gib=40.0)


def test_extends_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    write(tmp_path, GPU, "a/base.toml")
    write(tmp_path, 'extends = "../a/base.toml"', "b/middle.toml")
    assert load_recipe(write(tmp_path, 'extends = "b/middle.toml"')).gpu == "Test GPU"


def test_a_calibration_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    write(tmp_path, 'calibration = "c.npz"' + GPU, "a/base.toml")
    recipe = load_recipe(write(tmp_path, 'extends = "a/base.toml"'))
    assert recipe.calibration == str(tmp_path / "a" / "c.npz")
    assert load_recipe(write(tmp_path, to_toml(recipe), "elsewhere/shown.toml")) == recipe
    plain = load_recipe(write(tmp_path, GPU))
    assert plain.calibration is None
    assert recipe.portable() == plain
    assert recipe.digest() == plain.digest()
    assert "calibration in" in refusal(tmp_path, "calibration = 3" + GPU)


def test_an_error_names_the_file_in_which_the_value_stands(tmp_path: Path) -> None:
    write(tmp_path, GPU + "[limits]\nhost_memory_gib = 0", "base.toml")
    with pytest.raises(RecipeError, match=r"host_memory_gib in .*base\.toml is 0"):
        load_recipe(write(tmp_path, 'extends = "base.toml"'))


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"mine": "mine"}, "mine.toml -> mine.toml"),
        ({"mine": "a", "a": "b", "b": "a"}, "a.toml -> b.toml -> a.toml"),
    ],
)
def test_a_circle_is_an_error(tmp_path: Path, files: dict[str, str], circle: str) -> None:
    for name, parent in files.items():
        write(tmp_path, f'extends = "./{parent}.toml"', f"{name}.toml")
    with pytest.raises(RecipeError, match=re.escape(f"in a circle ({circle})")):
        load_recipe(str(tmp_path / "mine.toml"))


def test_an_unknown_parent_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'no recipe "l41s"; use "l40s"'):
        load_recipe(write(tmp_path, 'extends = "l41s"'))
