"""The exact answers are what their names say, and every instruction can be told from every other."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from pocket import samples
from pocket.edits import BLOCK, COLOURS, EDITS, Instruction, Picture, answer, instruction, say
from pocket.photographs import HELD_OUT, JUDGED, SIDE, TRAINED, crop, photograph, square
from pocket.samples import HELD_OUT_PAIRS, PAIRS, sample
from pocket.scenes import scene


@pytest.fixture(scope="module")
def picture() -> Picture:
    return scene(np.random.default_rng(3), 96, 160)


def made(picture: Picture, name: str, **options: str) -> np.ndarray:
    return answer(Instruction(name, tuple(options.items())), picture)


def test_there_are_edits_of_every_kind() -> None:
    assert len(EDITS) >= 16
    assert {edit.kind for edit in EDITS.values()} == {"colour", "geometry", "texture", "object", "reference"}
    assert all(len(edit.phrases) >= 4 for edit in EDITS.values())
    assert any(edit.pictures == 2 for edit in EDITS.values())


def test_no_two_instructions_are_said_alike() -> None:
    rng = np.random.default_rng(0)
    said = [say(instruction(rng, name), phrase) for name, e in EDITS.items() for phrase in range(len(e.phrases))]
    assert len(set(said)) == len(said)
    assert not any("{" in text for text in said)


def test_turns_and_mirrors(picture: Picture) -> None:
    for name, method in {
        "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
        "upside down": Image.Transpose.FLIP_TOP_BOTTOM,
        "rotate left": Image.Transpose.ROTATE_90,
        "rotate right": Image.Transpose.ROTATE_270,
    }.items():
        assert np.array_equal(made(picture, name), Image.fromarray(picture.image).transpose(method)), name


def test_grayscale_is_pillows(picture: Picture) -> None:
    luma = np.asarray(Image.fromarray(picture.image).convert("L")).astype(int)
    assert np.abs(made(picture, "grayscale").astype(int) - luma[..., None]).max() <= 1


def test_colours(picture: Picture) -> None:
    level = made(picture, "grayscale").mean()
    assert made(picture, "brighter").mean() > level + 10
    assert made(picture, "darker").mean() < level - 10
    assert np.array_equal(255 - made(picture, "invert"), picture.image)
    assert made(picture, "contrast").std() > picture.image.std()
    red, _, blue = made(picture, "sepia").reshape(-1, 3).mean(0)
    assert red > blue + 10
    red, green, blue = made(picture, "tint", colour="green").reshape(-1, 3).mean(0)
    assert green > max(red, blue)


def test_textures(picture: Picture) -> None:
    blocks = made(picture, "pixelate").reshape(96 // BLOCK, BLOCK, 160 // BLOCK, BLOCK, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    change = {name: np.abs(np.diff(made(picture, name).astype(int), axis=1)).max() for name in ("blur", "sharpen")}
    assert change["blur"] < np.abs(np.diff(picture.image.astype(int), axis=1)).max() <= change["sharpen"]
    flat = Picture(image=np.full((32, 32, 3), 90, np.uint8))
    assert made(flat, "edges").max() == 0
    assert made(picture, "edges").max() > 200


def test_objects(picture: Picture) -> None:
    drawn = made(picture, "draw", colour="red", shape="circle", place="at the top left")
    assert tuple(drawn[24, 40]) == COLOURS["red"]
    assert np.array_equal(drawn[60:], picture.image[60:])
    framed = made(picture, "frame", colour="blue")
    assert (framed[0] == COLOURS["blue"]).all()
    assert np.array_equal(framed[6:-6, 6:-6], picture.image[6:-6, 6:-6])
    assert picture.foreground is not None
    replaced = made(picture, "background", colour="white")
    assert (replaced[~picture.foreground] == COLOURS["white"]).all()
    assert np.array_equal(replaced[picture.foreground], picture.image[picture.foreground])


def test_the_second_picture_gives_its_colours() -> None:
    source, second = square("coffee"), square("flower")
    found = answer(Instruction("colours of picture 2"), Picture(image=source), Picture(image=second))
    before, after = (np.abs(image.mean((0, 1)) - second.mean((0, 1))) for image in (source, found))
    assert after.max() < before.max() / 2  # clipping takes the rest
    spread = np.abs(found.std((0, 1)) / second.std((0, 1)) - 1)
    assert spread.max() < 0.3


def test_answers_are_told_apart_on_what_is_judged() -> None:
    rng = np.random.default_rng(0)
    for name in JUDGED:
        picture = Picture(image=square(name))
        answers = {
            edit: answer(instruction(rng, edit), picture, Picture(image=square("rocket")))
            for edit, e in EDITS.items()
            if not e.scene and not (name == "rocket" and e.pictures == 2)
        }
        for (one, a), (other, b) in combinations(answers.items(), 2):
            assert np.mean((a.astype(float) - b) ** 2) > 20, (name, one, other)


def test_held_out_photographs_and_pairs_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(HELD_OUT) & set(TRAINED)
    assert set(HELD_OUT_PAIRS) < set(PAIRS)
    assert len(HELD_OUT_PAIRS) >= 10
    asked: list[str] = []
    monkeypatch.setattr(samples, "instruction", lambda rng, name: asked.append(name) or instruction(rng, name))
    rng, pairs = np.random.default_rng(0), set()
    for _ in range(400):
        asked.clear()
        sample(rng, 128, 128)
        if len(asked) == 2:
            pairs.add(tuple(sorted(asked, key=list(EDITS).index)))
    assert len(pairs) > 40
    assert not pairs & set(HELD_OUT_PAIRS)
    assert pairs <= set(PAIRS)


def test_samples_are_the_same_for_the_same_seed() -> None:
    one, other = (sample(np.random.default_rng(5), 96, 160) for _ in range(2))
    assert one.text == other.text
    assert np.array_equal(one.target, other.target)
    assert one.target.shape == (96, 160, 3)


@pytest.mark.parametrize("name", [*TRAINED, *HELD_OUT])
def test_photographs(name: str) -> None:
    assert square(name).shape == (SIDE, SIDE, 3)
    assert crop(np.random.default_rng(0), name, 96, 160).shape == (96, 160, 3)
    assert photograph(name).dtype == np.uint8
