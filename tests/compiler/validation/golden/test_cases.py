"""Cases are read strictly: every mistake is one sentence with the file, the case and the fix."""

import os
from pathlib import Path

import pytest
from PIL import Image

from qie.compiler.checkpoint.checkpoint import POCKET, open_checkpoint
from qie.compiler.checkpoint.model import Model
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.compiler.validation.golden.cases import find_cases, read_cases, shipped_cases, waves
from qie.engines.errors import GoldenError
from tests.support.images import smooth_image

PLAIN = '[[cases]]\nname = "a"\nimages = ["a.png"]\ninstruction = "make it red"\n'


@pytest.fixture(scope="module")
def model() -> Model:
    return open_checkpoint("pocket", weights=False).model


@pytest.fixture(scope="module")
def edit_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that takes one image."""
    folder = write_checkpoint(tmp_path_factory.mktemp("edit") / "tiny", ARCHITECTURES["tiny-edit"], weights=False)
    return open_checkpoint(str(folder), weights=False).model


def write(folder: Path, text: str) -> Path:
    smooth_image(150, 90).save(folder / "a.png")
    (folder / "cases.toml").write_text(text)
    return folder / "cases.toml"


def test_a_plain_case_takes_the_models_own_schedule_and_size(tmp_path: Path, model: Model) -> None:
    (case,) = read_cases(write(tmp_path, PLAIN), model)
    assert (case.steps, case.guidance, case.seed, case.negative, case.chain, case.target) == (4, 1.0, 0, " ", 0, None)
    assert (case.width, case.height) == (160, 96)
    assert case.recorded == (0, 2, 3)
    assert case.images[0].size == (150, 90)


@pytest.mark.parametrize(
    ("steps", "record", "recorded"),
    [(40, 8, (0, 6, 11, 17, 22, 28, 33, 39)), (40, 2, (0, 39)), (40, 1, (0,)), (3, 8, (0, 1, 2)), (1, 8, (0,))],
)
def test_steps_are_recorded_evenly_from_first_to_last(
    steps: int, record: int, recorded: tuple[int, ...], tmp_path: Path, model: Model
) -> None:
    (case,) = read_cases(write(tmp_path, f"{PLAIN}steps = {steps}\nrecord = {record}\n"), model)
    assert case.recorded == recorded


def test_a_model_without_a_schedule_has_that_of_the_published_ones(tmp_path: Path, edit_model: Model) -> None:
    (case,) = read_cases(write(tmp_path, PLAIN), edit_model)
    assert (case.steps, case.guidance) == (40, 4.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 cases, expected 1 to 64; write each under"),
        ("cases = 3", "cases in .* is 3; set it to an array"),
        ("[[case]]", 'unknown key "case" in .*; use "cases"'),
        ("[[cases", "is not TOML .*; correct it as docs/validation.md describes"),
        (f'{PLAIN}guidence = 2.0\n', r'unknown key "cases\[0\].guidence" in .*; use "cases\[0\].guidance"'),
        ('[[cases]]\nname = "a"\nimages = []\n', 'key "cases.0..instruction" is missing .* as docs/validation.md'),
        (PLAIN + PLAIN, "has 2 cases with the name 'a'; rename all but one"),
        (f"{PLAIN}steps = 0\n", r"cases\[0\].steps .* is 0; set it to a whole number from 1 to 1000 steps"),
        (f"{PLAIN}steps = 2.5\n", "is 2.5; set it to a whole number"),
        (f"{PLAIN}guidance = nan\n", "is nan; set it to a number from 1 to 100"),
        (f"{PLAIN}guidance = 0.5\n", "is 0.5; set it to a number from 1 to 100"),
        (f"{PLAIN}seed = -1\n", "is -1; set it to a whole number"),
        (f'{PLAIN}size = "1024"\n', 'is "1024"; set it to a string like "1024x768"'),
        (f'{PLAIN}size = "100x96"\n', "has the size 100x96, expected sides that are multiples of 16; round them"),
        (f'{PLAIN}size = "00x00"\n', "multiples of 16"),
        (f'{PLAIN}size = "99984x99984"\n', "99984x99984, 9,996,800,256 pixels, expected at most 262,144 with this"),
        (f'{PLAIN}size = "4112x16"\n', "size 4112x16, expected a side of at most 200 times the other; choose another"),
        (f'{PLAIN}size = "1600x16"\nchain = 2\n', "an image of 1600 x 16 pixels is too narrow for this model"),
        (f"{PLAIN}chain = 1\n", "has a chain of 1 edit, which is the edit itself; use 2 or more"),
        (f"{PLAIN}chain = 33\n", "is 33; set it to a whole number from 0 to 32 edits"),
        (f'{PLAIN}target = "a.png"\n', "has a target of 150x90 pixels and a result of 160x96; make the target"),
        (f'{PLAIN}target = "none.png"\n', "case 'a' of .*none.png does not exist; check the path"),
        (PLAIN.replace('"a.png"', '"none.png"'), "none.png does not exist; check the path"),
        (PLAIN.replace('"a.png"', r'"a.png\u0000"'), "a.png.x00' is no name of a file .*; check it"),
        (PLAIN.replace('"a.png"', '"/dev/zero"'), "case 'a' of .*/dev/zero is a pipe or a device; name an image file"),
        (f'{PLAIN}target = "/dev/zero"\n', "/dev/zero is a pipe or a device; name an image file"),
        (PLAIN.replace('"a.png"', '"cases.toml"'), "is not a PNG, JPEG or WebP image"),
        (PLAIN.replace('["a.png"]', "[]"), "has 0 images, this model takes 1 to 3; change its images"),
        (PLAIN.replace('["a.png"]', '["a.png", "a.png", "a.png", "a.png"]'), "has 4 images, this model takes 1 to 3"),
        (PLAIN.replace('["a.png"]', '["a.png", "a.png"]') + "chain = 2\n", "has a chain and 2 images, expected 1"),
        (PLAIN.replace("make it red", "  "), "has a blank instruction; write what to change"),
        (PLAIN.replace('"a"', '"../a"'), 'is "../a"; set it to a string like "two images"'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(text: str, message: str, tmp_path: Path, model: Model) -> None:
    path = write(tmp_path, text)
    with pytest.raises(GoldenError, match=message) as raised:
        read_cases(path, model)
    assert raised.value.option == "cases"
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, model: Model) -> None:
    with pytest.raises(GoldenError, match="none.toml cannot be read .*; name a TOML file of cases"):
        read_cases(tmp_path / "none.toml", model)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(GoldenError, match="is not TOML"):
        read_cases(tmp_path / "bytes.toml", model)
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(GoldenError, match="has 2,097,152 bytes"):
        read_cases(tmp_path / "large.toml", model)


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path, model: Model) -> None:
    """Nothing is written to the pipe, which would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(
            GoldenError, match=r"cannot be read \(it is a folder, a pipe or a device\); name a TOML file"
        ):
            read_cases(path, model)
    with pytest.raises(GoldenError, match="pipe is a pipe or a device; name an image file"):
        read_cases(write(tmp_path, PLAIN.replace("a.png", "pipe")), model)


def test_a_size_that_a_recipe_can_allow_is_taken(tmp_path: Path, model: Model) -> None:
    (case,) = read_cases(write(tmp_path, f'{PLAIN}size = "512x512"\n'), model)
    assert (case.width, case.height) == (512, 512)


def test_a_model_of_one_image_takes_one(tmp_path: Path, edit_model: Model) -> None:
    with pytest.raises(GoldenError, match="has 2 images, this model takes 1; change its images"):
        read_cases(write(tmp_path, PLAIN.replace('["a.png"]', '["a.png", "a.png"]')), edit_model)


def test_a_narrow_image_is_refused(tmp_path: Path, model: Model) -> None:
    path = write(tmp_path, PLAIN)
    Image.new("RGB", (1500, 10)).save(tmp_path / "a.png")
    with pytest.raises(GoldenError, match="case 'a' of .* is too narrow for this model"):
        read_cases(path, model)


def test_the_given_file_comes_before_the_checkpoints_own_and_the_shipped_ones(tmp_path: Path, model: Model) -> None:
    path = write(tmp_path, PLAIN)
    assert [case.name for case in find_cases(path, POCKET, model)] == ["a"]
    assert [case.name for case in find_cases(None, POCKET, model)] == [
        "wide", "tall with guidance", "two images", "five in a row",
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert find_cases(None, tmp_path / "empty", model) == shipped_cases(model)


def test_the_shipped_cases_suit_every_model(model: Model, edit_model: Model) -> None:
    assert [len(case.images) for case in shipped_cases(model)] == [1, 1, 2]
    assert [len(case.images) for case in shipped_cases(edit_model)] == [1, 1]
    for case in (*shipped_cases(model), *shipped_cases(edit_model)):
        assert case.recorded[0] == 0 and case.recorded[-1] == case.steps - 1
    assert any(case.chain == 5 for case in shipped_cases(edit_model))


def test_drawn_images_are_smooth_and_differ() -> None:
    image, other = waves(160, 96, seed=0), waves(160, 96, seed=1)
    assert image.size == (160, 96) and image.tobytes() != other.tobytes()
    assert image.tobytes() == waves(160, 96, seed=0).tobytes()
    low, high = image.convert("L").getextrema()
    assert isinstance(low, int) and isinstance(high, int) and high - low > 100
