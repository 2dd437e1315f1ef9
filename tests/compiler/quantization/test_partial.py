"""A calibration that was stopped goes on where it was, and ends with the same bytes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.quantization import statistics
from qie.compiler.quantization.calibration import Calibration, write_calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.partial import PartialCalibration, Reached
from qie.compiler.quantization.samples import CalibrationSample, draw_samples, read_images
from qie.compiler.quantization.statistics import Found
from qie.compiler.recipe.schema import SchemeName
from qie.engines.bundle.manifest import Component

BOTH: tuple[SchemeName, ...] = ("fp8", "int8-smooth")
SCHEMES: dict[Component, tuple[SchemeName, ...]] = {"language": BOTH, "transformer": BOTH}
BOUNDARIES = [(component, number) for component in ("vision", "language", "transformer") for number in (1, 2, 3)]


class Killed(Exception):
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Dying(PartialCalibration):
    """Dies after every write."""

    def write(self, reached: Reached) -> None:
        PartialCalibration.write(self, reached)
        raise Killed


@pytest.fixture(scope="module")
def two_samples(image_folder: Path) -> tuple[CalibrationSample, ...]:
    return draw_samples(read_images(image_folder, 2), INSTRUCTIONS, 2)


@pytest.fixture(scope="module")
def whole(
    tiny_checkpoint: Checkpoint, readers: dict[Any, TensorReader], two_samples: tuple[CalibrationSample, ...]
) -> Calibration:
    return measure(tiny_checkpoint, readers, two_samples, model="m", schemes=SCHEMES)


def written(calibration: Calibration, path: Path) -> bytes:
    write_calibration(calibration, path)
    return path.read_bytes()


def test_resumed_is_uninterrupted(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    two_samples: tuple[CalibrationSample, ...],
    whole: Calibration,
    tmp_path: Path,
) -> None:
    """Killed at every boundary of a block, and continued by another process."""
    partial = Dying(path=tmp_path / "reached", key="k")
    for boundary in BOUNDARIES:
        with pytest.raises(Killed):
            measure(tiny_checkpoint, readers, two_samples, model="m", schemes=SCHEMES, partial=partial)
        reached = partial.read()
        assert reached is not None
        assert (reached.component, reached.segments) == boundary
    resumed = measure(tiny_checkpoint, readers, two_samples, model="m", schemes=SCHEMES, partial=partial)
    assert written(resumed, tmp_path / "resumed.npz") == written(whole, tmp_path / "whole.npz")


def test_without_smoothing_only_what_fp8_needs_is_measured(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    two_samples: tuple[CalibrationSample, ...],
    whole: Calibration,
) -> None:
    made = measure(tiny_checkpoint, readers, two_samples, model="m", schemes={"transformer": ("fp8",)})
    assert (made.smoothing_scales, made.alphas) == ({}, {})
    assert set(whole.smoothing_scales) == {"int8-smooth"}
    assert made.amax.keys() == whole.amax.keys()
    assert all(np.array_equal(values, whole.amax[name]) for name, values in made.amax.items())


def test_only_the_components_that_are_quantized_are_smoothed(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    two_samples: tuple[CalibrationSample, ...],
    whole: Calibration,
) -> None:
    made = measure(tiny_checkpoint, readers, two_samples, model="m", schemes={"transformer": ("int8-smooth",)})
    groups, every = made.smoothing_scales["int8-smooth"], whole.smoothing_scales["int8-smooth"]
    assert groups.keys() == {name for name in every if name.startswith("transformer_blocks.")}
    assert len(groups) < len(every)
    assert all(np.array_equal(values, every[name]) for name, values in groups.items())


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    two_samples: tuple[CalibrationSample, ...],
    whole: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
) -> None:
    monkeypatch.setattr(statistics, "THREADS", threads)
    again = measure(tiny_checkpoint, readers, two_samples, model="m", schemes=SCHEMES)
    assert written(again, tmp_path / "again.npz") == written(whole, tmp_path / "whole.npz")


REACHED = Reached(
    component="language",
    segments=2,
    samples=[{"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.zeros((1, 2), np.int64)}, {}],
    found={"language": Found(amax={"a.b": np.ones(3, np.float32)}), "transformer": Found()},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    REACHED.found["language"].add("int8-smooth", "a/b", 0.5, np.full(3, 2, np.float32))
    partial = PartialCalibration(path=tmp_path / "reached", key="k")
    assert partial.read() is None
    partial.write(REACHED)
    back = partial.read()
    assert back is not None
    assert (back.component, back.segments, len(back.samples)) == ("language", 2, 2)
    assert all(np.array_equal(back.samples[0][name], value) for name, value in REACHED.samples[0].items())
    found = back.found["language"]
    assert np.array_equal(found.amax["a.b"], np.ones(3))
    assert (found.smoothing_scales["int8-smooth"]["a/b"].tolist(), found.alphas["int8-smooth"]) == (
        [2] * 3,
        {"a/b": 0.5},
    )
    assert back.found["transformer"].amax == {}


def test_a_block_writes_its_own_statistics_alone(tmp_path: Path) -> None:
    partial = PartialCalibration(path=tmp_path / "reached", key="k")
    found = Found(amax={"a": np.ones(1000, np.float32)})
    reached = replace(REACHED, found={"language": found})
    partial.write(reached)
    first = (partial.path / "0.found").stat()
    found.amax["b"] = np.full(3, 2, np.float32)
    partial.write(replace(reached, segments=3))
    assert sorted(file.name for file in partial.path.iterdir()) == ["0.found", "1.found", "state"]
    assert (partial.path / "0.found").stat() == first
    assert (partial.path / "1.found").stat().st_size < 1000

    again = PartialCalibration(path=tmp_path / "reached", key="k")
    back = again.read()
    assert back is not None
    assert {name: len(values) for name, values in back.found["language"].amax.items()} == {"a": 1000, "b": 3}
    back.found["language"].amax["c"] = np.ones(1, np.float32)
    again.write(back)
    assert sorted(file.name for file in partial.path.iterdir()) == ["0.found", "1.found", "2.found", "state"]
    for file in partial.path.iterdir():  # a file of another state, whose own digest is right
        if file.name == "0.found":
            file.write_bytes((partial.path / "1.found").read_bytes())
    assert again.read() is None


@pytest.mark.parametrize("name", ["state", "0.found"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "text", "folder", "absent"])
def test_a_damaged_state_counts_as_absent(tmp_path: Path, damage: str, name: str) -> None:
    PartialCalibration(path=tmp_path / "reached", key="k").write(REACHED)
    path = tmp_path / "reached" / name
    content = bytearray(path.read_bytes())
    match damage:
        case "flipped":
            content[-40] ^= 1
        case "cut":
            del content[-1]
        case "longer":
            content += b"0"
        case "empty":
            content.clear()
        case "text":
            content[:] = b"not a state of a calibration, " * 9
    path.unlink()
    match damage:
        case "folder":
            path.mkdir()
        case "absent":
            pass
        case _:
            path.write_bytes(content)
    assert PartialCalibration(path=tmp_path / "reached", key="k").read() is None


def test_a_state_of_another_calibration_counts_as_absent(tmp_path: Path) -> None:
    PartialCalibration(path=tmp_path / "reached", key="k").write(REACHED)
    assert PartialCalibration(path=tmp_path / "reached", key="other").read() is None
