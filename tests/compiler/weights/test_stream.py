"""One pass over the files of a checkpoint for all that is made of its tensors."""

import errno
import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import qie.compiler.weights.stream as module
from qie.compiler.checkpoint.safetensors import open_file
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.compiler.weights.prepare import prepare
from qie.compiler.weights.quantizer import Quantizer
from qie.compiler.weights.stream import write_weights
from qie.compiler.weights.weights_file import WeightsFile
from qie.engines.errors import CheckpointError
from tests.support.tensors import Tensors, draw, weight


class Collected:
    """A consumer that keeps what it takes."""

    def __init__(self, *sources: tuple[Subfolder, str], fails: Exception | None = None) -> None:
        self.sources, self.fails = sources, fails
        self.taken: list[str] = []
        self.finished = 0

    def take(self, subfolder: Subfolder, name: str, tensor: np.ndarray) -> None:
        assert not self.finished and (subfolder, name) in self.sources
        if self.fails:
            raise self.fails
        self.taken.append(name)

    def finish(self) -> None:
        self.finished += 1


def test_every_tensor_is_read_once_in_the_order_of_the_files() -> None:
    """Consumers are finished as soon as they have all, those that want nothing at once."""
    reader = Tensors({name: draw(10) for name in "abcdef"})
    one = Collected(("transformer", "d"), ("transformer", "b"))
    two = Collected(("transformer", "e"), ("transformer", "b"), ("transformer", "b"))
    none = Collected()
    calls: list[tuple[int, int]] = []
    seen = []
    for consumer in module.stream(
        [two, one, none], {"transformer": reader}, "transformer", progress=lambda *report: calls.append(report)
    ):
        seen.append((consumer, list(two.taken)))
    assert seen == [(none, []), (one, ["b"]), (two, ["b", "e"])]
    assert one.taken == ["b", "d"]
    assert [each.finished for each in (one, two, none)] == [1, 1, 1]
    assert reader.reads == 3
    assert calls == [(0, 120), (40, 120), (80, 120), (120, 120)]


def test_tensors_that_are_to_come_first() -> None:
    reader = Tensors({name: draw(10) for name in "abcdef"})
    consumer = Collected(*(("transformer", name) for name in "abcd"))
    assert list(module.stream([consumer], {"transformer": reader}, first=("c", "e", "b"))) == [consumer]
    assert consumer.taken == ["c", "b", "a", "d"]


def test_a_file_is_the_same_in_whatever_order_its_tensors_come(tmp_path: Path) -> None:
    """Quantized too, where one tensor makes values and scales far apart; the hash is that of the file."""
    int8, int4 = Quantizer(dtype="int8", per="channel"), Quantizer(dtype="int4", per="group", group_size=4)
    linears = {f"l{number}": draw(30 + number, 20) for number in range(4)}
    tensors = {**linears, "norm": draw(3), "odd": draw(5, 3), "conv": draw(6, 2, 1, 3, 3)}
    turned: dict[str, Any] = {"layout": ("transpose",)}
    weights = [
        *(weight(name, 20, 30 + n, dtype="int8", quantizer=int8, **turned) for n, name in enumerate(linears)),
        weight("norm", 3, dtype="bfloat16"),
        weight("odd", 3, 5, dtype="int4", quantizer=int4, **turned),
        weight("conv", 6, 2, 3, 3, layout=("last_frame",)),
        weight("odd.scale", 1, 5, quantizer=int4, scale_of="odd", **turned),
        *(weight(f"{name}.s", 30 + n, quantizer=int8, scale_of=name, **turned) for n, name in enumerate(linears)),
    ]
    names = list(tensors)
    orders = [names, names[::-1], names[3:] + names[:3]]
    files = []
    for number, order in enumerate(orders):
        reader = Tensors({name: tensors[name] for name in order})
        files.append(write_weights(weights, {"transformer": reader}, tmp_path / f"{number}"))
        assert reader.reads == len(tensors)
    contents = [file.path.read_bytes() for file in files]
    assert contents[0] == contents[1] == contents[2]
    assert {file.sha256 for file in files} == {hashlib.sha256(contents[0]).hexdigest()}
    for w in weights:
        if w.dtype != "int4":
            offset, length = files[0].places[w.name]
            assert contents[0][offset : offset + length] == prepare(w, tensors[w.source]).tobytes()


def test_two_files_are_written_in_one_pass(tmp_path: Path) -> None:
    reader = Tensors({name: draw(2000) for name in "abc"})
    both = [weight(name, 2000, dtype="bfloat16") for name in "ca"]
    with WeightsFile(both, tmp_path / "1") as one, WeightsFile([weight("a", 2000)], tmp_path / "2") as two:
        assert list(module.stream([one, two], {"transformer": reader})) == [two, one]
    assert reader.reads == 2
    assert one.written.sha256 == write_weights(both, {"transformer": reader}, tmp_path / "3").sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("problem", [CheckpointError("what; fix"), KeyboardInterrupt()])
@pytest.mark.parametrize("what", ["read", "take"])
def test_what_fails_leaves_no_file_and_no_thread(tmp_path: Path, what: str, problem: BaseException) -> None:
    class Failing(Tensors):
        def read(self, name: str) -> np.ndarray:
            if (what, name) == ("read", "c"):
                raise problem
            return super().read(name)

    before = threading.active_count()
    weights = [weight(name, 2000) for name in "abcd"]
    consumer = Collected(("transformer", "c"), fails=problem)  # type: ignore[arg-type]
    with pytest.raises(type(problem)) as caught:  # noqa: SIM117
        with WeightsFile(weights, tmp_path / "data") as file:
            list(module.stream([file, consumer], {"transformer": Failing({name: draw(2000) for name in "abcd"})}))
    assert caught.value is problem
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_a_pass_that_is_not_ended_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    readers: dict[Subfolder, Any] = {"transformer": Tensors({name: draw(2000) for name in "abcd"})}
    with WeightsFile([weight(name, 2000) for name in "abcd"], tmp_path / "data") as file:
        for _ in module.stream([Collected(("transformer", "a")), file], readers):
            break
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def fails(path: Path, patch: pytest.MonkeyPatch) -> str:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    patch.setattr(os, "preadv", fail)
    return r"cannot be read \(Input/output error\)"


def is_cut_short(path: Path, patch: pytest.MonkeyPatch) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return "was changed while it was read"


def is_swapped(path: Path, patch: pytest.MonkeyPatch) -> str:
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").replace(path)
    return "was changed while it was read"


@pytest.mark.parametrize("happens", [fails, is_cut_short, is_swapped])
def test_a_shard_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    monkeypatch.setattr(module, "AHEAD_TENSORS", 1)
    (tmp_path / "out").mkdir()
    path = tmp_path / "model.safetensors"
    save_file({name: draw(2000) for name in "abcdef"}, path)
    before, said = threading.active_count(), []

    def progress(done: int, _: int) -> None:
        if done >= 8000 and not said:
            said.append(happens(path, monkeypatch))

    weights = [weight(name, 2000) for name in "abcdef"]
    with pytest.raises(CheckpointError) as caught, WeightsFile(weights, tmp_path / "out" / "data") as file:
        list(module.stream([file], {"transformer": open_file(path)}, progress=progress))
    assert re.search(rf"model\.safetensors {said[0]}.*; ", str(caught.value))
    assert not list((tmp_path / "out").iterdir())
    assert threading.active_count() == before
