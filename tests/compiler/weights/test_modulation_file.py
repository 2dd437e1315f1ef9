"""Tables of several schedules in one pass over the modulation weights."""

import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.weights.modulation import CheckpointModulation, ModulationFile, modulation_bytes, modulation_weights
from qie.compiler.weights.stored_modulation import StoredModulation
from qie.compiler.weights.table_files import TableFiles
from qie.engines.bundle.modulation_rows import linears
from qie.engines.errors import CheckpointError
from qie.engines.inputs.modulation import ModulationShape, compute_tables

Floats = NDArray[np.float32]

SHORT, LONG = np.array([1.0, 0.63, 0], np.float32), np.array([1.0, 0.8, 0.63, 0.2, 0], np.float32)


class Shape:
    layers, width, zero_cond_t = 3, 16, True

    def __init__(self, layers: int = 3, zero_cond_t: bool = True) -> None:
        self.layers, self.zero_cond_t = layers, zero_cond_t


class Random:
    """A reader of random modulation weights, drawn when they are read."""

    def __init__(self, shape: ModulationShape, dtype: Any = np.float32, **changed: Any) -> None:
        dims = {f"{n}.{k}": d if k == "weight" else d[:1] for n, d in linears(shape.layers, shape.width).items()
                for k in ("weight", "bias")}  # fmt: skip
        self.dims, self.numpy, self.changed = dims, np.dtype(dtype), changed

    def names(self) -> tuple[str, ...]:
        return tuple(self.dims)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.dims[name]

    def dtype(self, name: str) -> str:
        return self.numpy.name

    def read(self, name: str) -> NDArray[Any]:
        values = np.random.default_rng(sum(name.encode())).normal(0, 0.3, self.dims[name])
        return values.astype(self.numpy)


def made(
    shape: ModulationShape,
    reader: Any,
    folder: Path,
    schedules: Sequence[Floats] = (SHORT, LONG),
    *,
    tables: Literal["float32", "bfloat16"] = "float32",
    mode: Literal["tables", "weights"] = "tables",
    shuffled: bool = False,
) -> ModulationFile:
    folder.mkdir(exist_ok=True)
    file = ModulationFile(shape, reader, folder, schedules=schedules, tables=tables, mode=mode)
    names = [name for _, name in file.sources]
    if shuffled:
        random.Random(0).shuffle(names)
    for name in (*file.first, *names):  # those that come first may come again
        file.take("transformer", name, reader.read(name))
    file.finish()
    return file


def content(folder: Path, file: ModulationFile) -> list[bytes]:
    return [(folder / record.path).read_bytes() for record in file.tables]


@pytest.mark.parametrize("tables", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_cond_t", [True, False])
def test_equal_to_tables_that_are_computed_alone(
    tmp_path: Path, tables: Literal["float32", "bfloat16"], zero_cond_t: bool
) -> None:
    shape = Shape(zero_cond_t=zero_cond_t)
    reader = Random(shape, ml_dtypes.bfloat16)
    file = made(shape, reader, tmp_path, tables=tables)
    for record, schedule in zip(file.tables, (SHORT, LONG), strict=True):
        alone = compute_tables(CheckpointModulation(shape, reader), shape, schedule)
        stored = np.load(tmp_path / record.path)
        assert stored.shape == alone.shape
        if tables == "float32":
            np.testing.assert_allclose(stored, alone, rtol=0, atol=5e-6)
        else:  # one unit in the last place
            expected = alone.astype(ml_dtypes.bfloat16).view(np.uint16)
            assert np.abs(stored.astype(int) - expected.astype(int)).max() <= 1
            assert (stored != expected).mean() < 0.01


def test_no_order_of_the_tensors_and_no_mode_changes_a_byte(tmp_path: Path) -> None:
    shape = Shape()
    reader = Random(shape, ml_dtypes.bfloat16)
    plain = made(shape, reader, tmp_path / "plain")
    for mode in ("tables", "weights"):
        other = made(shape, reader, tmp_path / mode, mode=mode, shuffled=True)  # type: ignore[arg-type]
        assert other.record.identity == plain.record.identity
        assert [record.path for record in other.tables] == [record.path for record in plain.tables]
        assert content(tmp_path / mode, other) == content(tmp_path / "plain", plain)
    assert not (tmp_path / "tables" / "modulation.weights").exists()
    assert other.record.file is not None
    assert other.record.file.bytes == modulation_bytes(modulation_weights(shape, reader))
    stored = StoredModulation(tmp_path / "weights", other.record)
    for name in stored.names():
        assert np.array_equal(stored.read(name), reader.read(name).astype(stored.dtype(name)))
    for ask in (stored.shape, stored.dtype, stored.read):
        with pytest.raises(CheckpointError, match="have no tensor 'none'; build the bundle again"):
            ask("none")


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    shape = Shape()
    reader = Random(shape)
    first = made(shape, reader, tmp_path / "first").record.identity
    assert first == made(shape, reader, tmp_path / "second", [LONG]).record.identity

    class Changed(Random):
        def read(self, name: str) -> NDArray[Any]:
            values = super().read(name)
            if name == "transformer_blocks.2.txt_mod.1.bias":
                values[-1] += 1
            return values

    assert made(shape, Changed(shape), tmp_path / "changed").record.identity != first
    assert made(shape, Random(shape, ml_dtypes.bfloat16), tmp_path / "rounded").record.identity != first


def test_equal_schedules_are_one_file_and_equal_timesteps_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: set[int] = set()
    write = TableFiles.write

    def counted(self: TableFiles, linear: str, first: int, values: Floats) -> None:
        rows.add(len(values))
        write(self, linear, first, values)

    monkeypatch.setattr(TableFiles, "write", counted)
    file = made(Shape(), Random(Shape()), tmp_path, [SHORT, LONG, SHORT.copy()])
    assert len(file.tables) == 2
    assert rows == {5}  # 1, 0.8, 0.63 and 0.2, and 0 for the references


def test_timesteps_that_are_too_many_for_one_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, reader = Shape(), Random(Shape())
    whole = made(shape, reader, tmp_path / "whole")
    monkeypatch.setattr("qie.compiler.weights.table_files.TIMESTEPS_MAX", 2)
    parts = made(shape, reader, tmp_path / "parts", shuffled=True)
    for one, other in zip(whole.tables, parts.tables, strict=True):
        expected, found = (np.load(tmp_path / name) for name in (f"whole/{one.path}", f"parts/{other.path}"))
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_memory_does_not_grow_with_blocks_or_tables(tmp_path: Path) -> None:
    shape = Shape(layers=80)
    schedule = np.append(np.linspace(1, 0.1, 60, dtype=np.float32), np.float32(0))
    reader = Random(shape)
    made(Shape(), Random(Shape()), tmp_path / "before", [schedule])  # threads and their scratch memory are there
    tracemalloc.start()
    try:
        file = made(shape, reader, tmp_path / "measured", [schedule])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.tables[0].bytes > 5_000_000
    assert peak < 1_500_000


@pytest.mark.parametrize(("change", "sentence"), [("nan", "infinite or NaN elements"), ("shape", "has shape")])
def test_a_bad_tensor(tmp_path: Path, change: str, sentence: str) -> None:
    shape, bad = Shape(), "transformer_blocks.1.img_mod.1.weight"

    class Bad(Random):
        def read(self, name: str) -> NDArray[Any]:
            values = super().read(name)
            if name == bad and change == "nan":
                values[3, 3] = np.nan
            return values[:-1] if name == bad and change == "shape" else values

    with pytest.raises(CheckpointError, match=sentence):
        made(shape, Bad(shape), tmp_path)


def test_modulation_that_is_not_finite(tmp_path: Path) -> None:
    class Huge(Random):
        def read(self, name: str) -> NDArray[Any]:
            values = super().read(name)
            return np.full_like(values, 3e38) if name == "transformer_blocks.1.img_mod.1.weight" else values

    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.img_mod\.1 gives modulation that is not finite"):
        made(Shape(), Huge(Shape()), tmp_path)


def test_a_missing_tensor_is_found_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(checkpoint))
    with pytest.raises(CheckpointError, match=r"norm_out\.linear\.weight' is missing"):
        ModulationFile(opened.model.transformer, opened.reader("vae"), tmp_path, schedules=[SHORT], tables="float32",
                       mode="weights")  # fmt: skip
    assert list(tmp_path.iterdir()) == []
