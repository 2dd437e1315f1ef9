"""The exact results are what their names say, and every instruction can be told from every other."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from pocket.data import examples
from pocket.data.edits import EDITS, Instruction, exact_result, instruction_text, random_instruction
from pocket.data.examples import HELD_OUT_PAIRS, PAIRS, draw_example
from pocket.data.images import EVALUATED, HELD_OUT, SIDE, TRAINED, center_crop, load_photo, random_crop
from pocket.data.operations import BLOCK, COLORS, Source
from pocket.data.scenes import scene


@pytest.fixture(scope="module")
def source() -> Source:
    return scene(np.random.default_rng(3), 96, 160)


def result(source: Source, name: str, **options: str) -> np.ndarray:
    return exact_result(Instruction(name, tuple(options.items())), source)


def test_there_are_edits_of_every_kind() -> None:
    assert len(EDITS) >= 16
    assert {edit.kind for edit in EDITS.values()} == {"color", "geometry", "texture", "object", "reference"}
    assert all(len(edit.phrases) >= 4 for edit in EDITS.values())
    assert any(edit.images == 2 for edit in EDITS.values())


def test_no_two_instructions_have_the_same_text() -> None:
    rng = np.random.default_rng(0)
    texts = [
        instruction_text(random_instruction(rng, name), phrase)
        for name, edit in EDITS.items()
        for phrase in range(len(edit.phrases))
    ]
    assert len(set(texts)) == len(texts)
    assert not any("{" in text for text in texts)


def test_turns_and_mirrors(source: Source) -> None:
    for name, method in {
        "mirror": Image.Transpose.FLIP_LEFT_RIGHT,
        "upside down": Image.Transpose.FLIP_TOP_BOTTOM,
        "rotate left": Image.Transpose.ROTATE_90,
        "rotate right": Image.Transpose.ROTATE_270,
    }.items():
        assert np.array_equal(result(source, name), Image.fromarray(source.image).transpose(method)), name


def test_grayscale_is_pillows(source: Source) -> None:
    luma = np.asarray(Image.fromarray(source.image).convert("L")).astype(int)
    assert np.abs(result(source, "grayscale").astype(int) - luma[..., None]).max() <= 1


def test_colors(source: Source) -> None:
    level = result(source, "grayscale").mean()
    assert result(source, "brighter").mean() > level + 10
    assert result(source, "darker").mean() < level - 10
    assert np.array_equal(255 - result(source, "invert"), source.image)
    assert result(source, "contrast").std() > source.image.std()
    red, _, blue = result(source, "sepia").reshape(-1, 3).mean(0)
    assert red > blue + 10
    red, green, blue = result(source, "tint", color="green").reshape(-1, 3).mean(0)
    assert green > max(red, blue)


def test_textures(source: Source) -> None:
    blocks = result(source, "pixelate").reshape(96 // BLOCK, BLOCK, 160 // BLOCK, BLOCK, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    change = {name: np.abs(np.diff(result(source, name).astype(int), axis=1)).max() for name in ("blur", "sharpen")}
    assert change["blur"] < np.abs(np.diff(source.image.astype(int), axis=1)).max() <= change["sharpen"]
    flat = Source(image=np.full((32, 32, 3), 90, np.uint8))
    assert result(flat, "edges").max() == 0
    assert result(source, "edges").max() > 200


def test_objects(source: Source) -> None:
    drawn = result(source, "draw", color="red", shape="circle", place="at the top left")
    assert tuple(drawn[24, 40]) == COLORS["red"]
    assert np.array_equal(drawn[60:], source.image[60:])
    framed = result(source, "frame", color="blue")
    assert (framed[0] == COLORS["blue"]).all()
    assert np.array_equal(framed[6:-6, 6:-6], source.image[6:-6, 6:-6])
    assert source.foreground is not None
    replaced = result(source, "background", color="white")
    assert (replaced[~source.foreground] == COLORS["white"]).all()
    assert np.array_equal(replaced[source.foreground], source.image[source.foreground])


def test_the_second_image_gives_its_colors() -> None:
    first, second = center_crop("coffee"), center_crop("flower")
    recolored = exact_result(Instruction("colours of picture 2"), Source(image=first), Source(image=second))
    before, after = (np.abs(image.mean((0, 1)) - second.mean((0, 1))) for image in (first, recolored))
    assert after.max() < before.max() / 2  # clipping takes the rest
    spread = np.abs(recolored.std((0, 1)) / second.std((0, 1)) - 1)
    assert spread.max() < 0.3


def test_results_differ_on_the_evaluated_photos() -> None:
    rng = np.random.default_rng(0)
    for name in EVALUATED:
        source = Source(image=center_crop(name))
        results = {
            edit: exact_result(random_instruction(rng, edit), source, Source(image=center_crop("rocket")))
            for edit, e in EDITS.items()
            if not e.scene and not (name == "rocket" and e.images == 2)
        }
        for (one, a), (other, b) in combinations(results.items(), 2):
            assert np.mean((a.astype(float) - b) ** 2) > 20, (name, one, other)


def test_held_out_photos_and_pairs_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(HELD_OUT) & set(TRAINED)
    assert set(HELD_OUT_PAIRS) < set(PAIRS)
    assert len(HELD_OUT_PAIRS) >= 10
    names: list[str] = []
    monkeypatch.setattr(
        examples, "random_instruction", lambda rng, name: names.append(name) or random_instruction(rng, name)
    )
    rng, pairs = np.random.default_rng(0), set()
    for _ in range(400):
        names.clear()
        draw_example(rng, 128, 128)
        if len(names) == 2:
            pairs.add(tuple(sorted(names, key=list(EDITS).index)))
    assert len(pairs) > 40
    assert not pairs & set(HELD_OUT_PAIRS)
    assert pairs <= set(PAIRS)


def test_equal_seeds_draw_equal_examples() -> None:
    one, other = (draw_example(np.random.default_rng(5), 96, 160) for _ in range(2))
    assert one.text == other.text
    assert np.array_equal(one.target, other.target)
    assert one.target.shape == (96, 160, 3)


@pytest.mark.parametrize("name", [*TRAINED, *HELD_OUT])
def test_photos(name: str) -> None:
    assert center_crop(name).shape == (SIDE, SIDE, 3)
    assert random_crop(np.random.default_rng(0), name, 96, 160).shape == (96, 160, 3)
    assert load_photo(name).dtype == np.uint8
