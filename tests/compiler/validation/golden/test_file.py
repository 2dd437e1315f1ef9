"""A golden file comes back as it was written, and nothing else opens as one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qie.compiler.checkpoint.checkpoint import POCKET
from qie.compiler.validation.golden.file import GOLDEN_FILE, Golden, is_golden, open_golden, png, write_golden
from qie.compiler.validation.golden.records import GoldenRecord, case_tensor, module_tensor
from qie.engines.errors import GoldenError
from tests.support.images import smooth_image

Tensors = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return load_file(POCKET / GOLDEN_FILE)


def test_a_file_comes_back_as_it_was_written(pocket_golden: Golden, tensors: Tensors, tmp_path: Path) -> None:
    write_golden(pocket_golden.record, tensors, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (POCKET / GOLDEN_FILE).read_bytes()
    again = open_golden(tmp_path / "again")
    assert again.record == pocket_golden.record
    assert [case.record.name for case in again.cases] == [case.name for case in pocket_golden.record.cases]
    for case, expected in zip(again.cases, pocket_golden.cases, strict=True):
        assert case.tensors.keys() == expected.tensors.keys()
        for name, array in expected.tensors.items():
            np.testing.assert_array_equal(case.tensors[name], array)
    for modules in pocket_golden.record.modules:
        assert tuple(again.modules[modules.component]) == modules.names


@pytest.mark.parametrize("part", range(64))
def test_a_flipped_byte_anywhere_is_refused(part: int, tmp_path: Path) -> None:
    content = bytearray((POCKET / GOLDEN_FILE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = header * part // 32 if part < 32 else header + (len(content) - header) * (part - 32) // 32
    content[place] ^= 1 << (part % 8)
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(GoldenError, match="; record"):
        open_golden(tmp_path / "flipped")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: save_file({"a": np.zeros(2)}, path), "is not a golden file"),
    ],
)
def test_another_file_is_refused(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes((POCKET / GOLDEN_FILE).read_bytes())
    spoil(path)
    with pytest.raises(GoldenError, match=message):
        open_golden(path)
    assert not is_golden(path)


def forged(record: GoldenRecord, tensors: Tensors, path: Path, **changes: Any) -> Path:
    """A file whose digests fit, with other keys in its description."""
    write_golden(replace(record, **changes), tensors, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema is 2, expected 1"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"cases": ()}, "it has no cases"),
        ({"modules": ()}, "which nothing describes"),
        ({"packages": (("torch",),)}, "packages"),
        ({"model": ["nested"] * 100}, "model is"),
    ],
)
def test_a_hostile_description_is_refused(
    pocket_golden: Golden, tensors: Tensors, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GoldenError, match=message):
        open_golden(forged(pocket_golden.record, tensors, tmp_path / "forged", **changes))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", 0, "steps is 0"),
        ("steps", 10**400, "steps is"),
        ("seed", -1, "seed is -1"),
        ("guidance", float("nan"), "guidance is nan"),
        ("guidance", 2.0, "lacks 'case.0.negative_embeds'"),
        ("width", 168, "result of"),
        ("width", 320, "pixels, expected"),
        ("images", 2, "lacks 'case.0.input.1'"),
        ("images", 4, "images is 4"),
        ("recorded", (0, 1, 2), "expected float32"),
        ("recorded", (0, 2, 1, 3), "records the steps"),
        ("recorded", (0, 1, 2, 4), "records the steps"),
        ("recorded", (), "records the steps"),
        ("chain", 3, "lacks 'case.0.chain.0'"),
        ("target", False, "nothing describes"),
        ("name", "two images", "two of one name"),
        ("name", "\ud800", "UTF-8"),
    ],
)
def test_a_hostile_case_is_refused(
    pocket_golden: Golden, tensors: Tensors, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    first, *others = pocket_golden.record.cases
    cases = (replace(first, **{key: value}), *others)
    with pytest.raises(GoldenError, match=message):
        open_golden(forged(pocket_golden.record, tensors, tmp_path / "forged", cases=cases))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("component", "decoder", "component is 'decoder'"),
        ("names", ("img_in",), "do not belong together"),
        ("shapes", ((0, 5),), "do not belong together"),
        ("blocks", ("none",), "do not belong together"),
        ("component", "vae_decoder", "samples a component twice"),
    ],
)
def test_hostile_modules_are_refused(
    pocket_golden: Golden, tensors: Tensors, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    first, *others = pocket_golden.record.modules
    with pytest.raises(GoldenError, match=message):
        open_golden(
            forged(
                pocket_golden.record, tensors, tmp_path / "forged", modules=(replace(first, **{key: value}), *others)
            )
        )


@pytest.mark.parametrize("shape", [(0, 5), (1 << 40, 1 << 40), (3, 3)])
def test_an_output_that_no_module_has_is_refused(
    pocket_golden: Golden, tensors: Tensors, tmp_path: Path, shape: tuple[int, int]
) -> None:
    first, *others = pocket_golden.record.modules
    shapes = (shape, *first.shapes[1:])
    with pytest.raises(GoldenError, match="is not as it says"):
        open_golden(
            forged(pocket_golden.record, tensors, tmp_path / "forged", modules=(replace(first, shapes=shapes), *others))
        )


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("edit", np.zeros(20, np.uint8), "is no PNG image"),
        ("edit", png(smooth_image(160, 97)), "has .160, 97. pixels"),
        ("edit", np.frombuffer(b"BM" + bytes(100), np.uint8), "is no PNG image"),
        ("noise", np.zeros((60, 64)), "is float64"),
        ("noise", np.zeros((60, 63), np.float32), r"float32 \[60, 63\], expected float32 \[60, 64\]"),
        ("patches", np.zeros(9, np.uint8), "while decompressing data"),
        ("grid_thw", np.array([[1, -8, 5]]), "grid_thw has a side"),
        ("grid_thw", np.array([[1, 37, 1]]), "in 37 rows"),
        ("unknown", np.zeros(3), "which nothing describes"),
    ],
)
def test_a_hostile_tensor_is_refused(
    pocket_golden: Golden, tensors: Tensors, tmp_path: Path, name: str, array: np.ndarray[Any, Any], message: str
) -> None:
    changed = tensors | {case_tensor(0, name): array}
    with pytest.raises(GoldenError, match=message):
        open_golden(forged(pocket_golden.record, changed, tmp_path / "forged"))


def test_a_missing_tensor_is_named(pocket_golden: Golden, tensors: Tensors, tmp_path: Path) -> None:
    for name in (case_tensor(1, "velocity"), module_tensor("vision", "visual.blocks.0")):
        rest = {key: array for key, array in tensors.items() if key != name}
        with pytest.raises(GoldenError, match=f"it lacks '{name}'; record it again"):
            open_golden(forged(pocket_golden.record, rest, tmp_path / "forged"))


def test_a_description_of_another_digest_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, tmp_path / "forged", {"qie.golden": f"{'0' * 64} {{}}"})
    with pytest.raises(GoldenError, match="does not have its digest"):
        open_golden(tmp_path / "forged")
