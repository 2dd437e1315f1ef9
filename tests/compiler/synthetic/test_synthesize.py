"""A synthetic checkpoint is complete or absent, and a shard made on demand is that of the folder written whole."""

import errno
import hashlib
import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.subfolders import SUBFOLDERS
from qie.compiler.synthetic import shards as module
from qie.compiler.synthetic import synthesize as folders
from qie.compiler.synthetic.layout import ShardFile, StoredTensor
from qie.compiler.synthetic.shards import SyntheticShards, shard_bytes
from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.engines.errors import CheckpointError

SHARD = 200_000


def write(folder: Path, **options: Any) -> Path:
    return synthesize(plan_synthesis("tiny", folder, **{"shard_bytes": SHARD, **options}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def on_demand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("on-demand") / "tiny", on_demand=True)


def test_it_opens_as_a_checkpoint(whole: Path) -> None:
    checkpoint = open_checkpoint(str(whole))
    checkpoint.check_layers()
    for subfolder, reader in checkpoint.readers().items():
        assert {reader.dtype(name) for name in reader.names()} == {"bfloat16"}
        stored = {k: v for path in (whole / subfolder).glob("*.safetensors") for k, v in load_file(path).items()}
        assert len(stored) == len(reader.names())
    assert set(checkpoint.readers()) == set(SUBFOLDERS)


def test_a_seed_decides_every_byte(whole: Path, tmp_path: Path) -> None:
    assert contents(write(tmp_path / "same")) == contents(whole)
    other = contents(write(tmp_path / "other", seed=1))
    assert {path for path, data in contents(whole).items() if other[path] != data} == {
        path for path in other if path.endswith(".safetensors")
    }


def test_layers_decide_no_value(whole: Path, tmp_path: Path) -> None:
    deeper = open_checkpoint(str(write(tmp_path / "deeper", layers=3, language_layers=4)))
    assert (deeper.model.transformer.layers, deeper.model.language.layers) == (3, 4)
    deeper.check_layers()
    for subfolder, reader in open_checkpoint(str(whole)).readers().items():
        for name in reader.names():
            np.testing.assert_array_equal(deeper.readers()[subfolder].read(name), reader.read(name))


def test_without_shards_everything_else_is_there(whole: Path, on_demand: Path) -> None:
    files = contents(on_demand)
    record = json.loads(files.pop(module.FILE))
    assert files == {path: data for path, data in contents(whole).items() if not path.endswith(".safetensors")}
    assert record["shards"] == {
        path: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for path, data in contents(whole).items()
        if path.endswith(".safetensors")
    }
    checkpoint = open_checkpoint(str(on_demand), weights=False)
    assert not checkpoint.complete
    with pytest.raises(
        CheckpointError, match="has no weights, and they can be made .*; synthesize the checkpoint with"
    ):
        checkpoint.with_weights()


def test_a_shard_on_demand_is_that_of_the_whole(whole: Path, on_demand: Path, tmp_path: Path) -> None:
    shards = SyntheticShards.open(on_demand)
    assert shards is not None and len(shards.shards) > 5
    for number, path in enumerate(reversed(shards.shards)):
        reports: list[tuple[int, int]] = []
        shards.fetch(path, tmp_path / str(number), progress=lambda done, total, to=reports: to.append((done, total)))
        assert (tmp_path / str(number)).read_bytes() == (whole / path).read_bytes()
        assert reports[-1] == (shards.shards[path].bytes, shards.shards[path].bytes)


def test_a_folder_with_its_shards_makes_none_on_demand(whole: Path) -> None:
    assert SyntheticShards.open(whole) is None


def test_an_unknown_shard_is_refused(on_demand: Path, tmp_path: Path) -> None:
    shards = SyntheticShards.open(on_demand)
    assert shards is not None
    with pytest.raises(CheckpointError, match="no shard ../etc/passwd; name one of transformer/"):
        shards.fetch("../etc/passwd", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "another version"),
        ({"architecture": "none"}, "damaged"),
        ({"layers": 3}, "other sizes"),
        ({"layers": True}, "damaged"),
        ({"layers": 10**9}, "numbers that no checkpoint has"),
        ({"seed": "0"}, "damaged"),
        ({"shards": []}, "damaged"),
        ({"shards": {"x": {"bytes": 1, "sha256": ""}}}, "damaged"),
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any], said: str, on_demand: Path, tmp_path: Path) -> None:
    record = json.loads((on_demand / module.FILE).read_text())
    (tmp_path / module.FILE).write_text(json.dumps(record | change))
    with pytest.raises(CheckpointError, match=f"{said}.*; synthesize the checkpoint again"):
        SyntheticShards.open(tmp_path)


@pytest.mark.parametrize("files", [1, 4])
def test_memory_is_bounded(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 64 MB takes a fraction of that, and so do several."""
    monkeypatch.setattr(module, "cores", lambda: 2)
    shape = (2048 // files, 16384)
    tensors = [
        StoredTensor(stored=str(n), name=f"{n}.weight", shape=shape, bytes=2 * shape[0] * shape[1])
        for n in range(files)
    ]
    file = ShardFile(path="transformer/x", subfolder="transformer", tensors=tuple(tensors), header=b"")
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in shard_bytes(file, 0)) == 2 * 2048 * 16384
        assert tracemalloc.get_traced_memory()[1] < 24 * 10**6
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(CheckpointError, match="needs 57,.*1,000,000 free; free some space"):
        plan_synthesis("2511", tmp_path / "out")
    assert plan_synthesis("tiny", tmp_path / "out", on_demand=True).disk_bytes < 10**6
    assert not list(tmp_path.iterdir())


def test_what_is_stated_is_what_is_written(whole: Path, on_demand: Path, tmp_path: Path) -> None:
    for folder, demand in ((whole, False), (on_demand, True)):
        stated = plan_synthesis("tiny", tmp_path / "x", shard_bytes=SHARD, on_demand=demand).disk_bytes
        written = sum(len(data) for data in contents(folder).values())
        assert written <= stated < written * 1.05


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_leaves_nothing(stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: ShardFile, seed: int) -> Iterator[bytes | memoryview]:
        yield from list(shard_bytes(file, seed))[:3]
        raise stop

    monkeypatch.setattr(folders, "shard_bytes", fail)
    monkeypatch.setattr(module, "shard_bytes", fail)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
        write(tmp_path / "out")
    if isinstance(stop, OSError):
        assert re.search(r"is full, the checkpoint needs [\d,]+ bytes; free some space", str(caught.value))
    recorded = plan_synthesis("tiny", tmp_path / "out").recorded
    with pytest.raises(type(stop)):
        SyntheticShards(recorded=recorded, shards={}).fetch(recorded.files()[0].path, tmp_path / "shard")
    assert not list(tmp_path.iterdir())


def test_what_came_meanwhile_is_kept(tmp_path: Path) -> None:
    plan = plan_synthesis("tiny", tmp_path / "out", on_demand=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        synthesize(plan)
    assert contents(tmp_path) == {"out/mine": b"x"}


def test_activations_stay_bounded_at_any_depth(tmp_path: Path) -> None:
    """Every block adds to the residual stream, and none multiplies it, in a model so narrow that outliers are many."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / "deep", layers=24, language_layers=24, shard_bytes=None)
    transformer = diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype="float32")
    sizes: dict[str, list[float]] = {"transformer": [], "language": []}
    for block in transformer.transformer_blocks:
        block.register_forward_hook(lambda _, __, out: sizes["transformer"].append(float(out[1].std())))
    for layer in encoder.model.language_model.layers:
        layer.register_forward_hook(
            lambda _, __, out: sizes["language"].append(float((out[0] if isinstance(out, tuple) else out).std()))
        )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoder.model.language_model(input_ids=torch.randint(0, 500, (1, 32), generator=generator))
        out = transformer(
            hidden_states=torch.randn(1, 64, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 16, 64, generator=generator),
            encoder_hidden_states_mask=torch.ones(1, 16, dtype=torch.long),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 8, 8)]],
        ).sample
    for component, std in sizes.items():  # 1.3 times as large after every block would be 540 after the last
        assert len(std) == 24 and max(std) < 200, component
    assert 0.1 < float(out.std()) < 10
