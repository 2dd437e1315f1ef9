"""The stand-in for the package ``tensorrt_llm``: a run gives the reader's hidden states, misuse is found."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qie.engines.sessions import cuda
from tests.support.fake_gpu import Gpu, Misuse
from tests.support.trtllm.by_hand import POSITIONS, write_by_hand
from tests.support.trtllm.checkpoint import open_decoder
from tests.support.trtllm.engine import TRT
from tests.support.trtllm.runtime import TensorInfo, install_runtime
from tests.support.trtllm.small import HEAD, LAYERS, VOCABULARY, WIDTH, Small
from tests.support.trtllm.tensors import HOST

Arrays = dict[str, NDArray[Any]]


def int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


class Prompt:
    """A session of the stand-in with the inputs of one prompt; a test changes what it likes."""

    def __init__(self, gpu: Gpu, package: Any, engine: bytes, small: Small) -> None:
        cuda.use(0)
        self.gpu, self.stream = gpu, cuda.Stream()
        self.session = package.runtime.Session.from_serialized_engine(engine)
        tokens = len(small.ids)
        self.arrays: Arrays = {
            "input_ids": small.ids,
            "position_ids": np.arange(tokens, dtype=np.int32),
            "last_token_ids": int32(tokens),
            "prompt_embedding_table": small.image,
            "tasks": np.zeros(tokens, np.int32),
            "prompt_vocab_size": int32(len(small.image)),
            "mrope_rotary_cos_sin": small.rotary(POSITIONS).reshape(1, -1),
            "mrope_position_deltas": np.zeros((1, 1), np.int32),
            "host_request_types": int32(0),
            "context_lengths": int32(tokens),
            "host_runtime_perf_knobs": np.full(16, -1, np.int64),
            "host_context_progress": np.zeros(1, np.int64),
            "host_context_lengths": int32(tokens),
            "host_max_attention_window_sizes": int32(*[POSITIONS] * LAYERS),
            "host_sink_token_length": int32(0),
        }
        self.memory: list[int] = []
        self.places: dict[str, int] = {}

    def run(self) -> NDArray[np.float32]:
        shapes = [TensorInfo(name, TRT[array.dtype.name], array.shape) for name, array in self.arrays.items()]
        (output,) = self.session.infer_shapes(shapes)
        assert (output.name, output.dtype) == ("hidden_states", TRT["float32"])
        for name, array in self.arrays.items():
            self.places[name] = array.ctypes.data if name in HOST else self.upload(array)
        result = np.zeros(output.shape, np.float32)
        place = self.allocate(result.nbytes)
        assert self.session.run(self.places, {"hidden_states": place}, self.stream.handle), self.gpu.refused
        cuda.copy_to_host(result, place, self.stream)
        self.stream.synchronize()
        return result

    def allocate(self, size: int) -> int:
        self.memory.append(cuda.allocate(size))
        return self.memory[-1]

    def upload(self, array: NDArray[Any]) -> int:
        place = self.allocate(array.nbytes)
        cuda.copy_to_device(place, np.ascontiguousarray(array), self.stream)
        self.stream.synchronize()
        return place


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    gpu.install(monkeypatch)
    return gpu


@pytest.fixture
def prompt(plain: Gpu, monkeypatch: pytest.MonkeyPatch, engine: bytes, decoder: Small) -> Iterator[Prompt]:
    yield Prompt(plain, install_runtime(plain, monkeypatch), engine, decoder)
    assert plain.crashes == []


def test_a_run_gives_what_the_reader_computes(prompt: Prompt, decoder: Small, tmp_path: Path) -> None:
    """Which is transformers' (tests/compiler/backends/tensorrt_llm/test_reader.py)."""
    loaded = open_decoder(write_by_hand(tmp_path / "made", decoder))
    expected = loaded(loaded.embed(decoder.ids, decoder.image), decoder.rotary(POSITIONS))
    assert expected.std() > 0.5
    assert np.array_equal(prompt.run(), expected)


def test_the_table_of_inputs(prompt: Prompt) -> None:
    engine = prompt.session.engine
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    assert set(names) == prompt.arrays.keys() | {"hidden_states"}
    assert tuple(engine.get_tensor_shape("prompt_embedding_table")) == (-1, WIDTH)
    assert tuple(engine.get_tensor_shape("mrope_rotary_cos_sin")) == (1, POSITIONS * HEAD)
    assert [tuple(each) for each in engine.get_tensor_profile_shape("input_ids", 0)] == [(1,), (32,), (POSITIONS,)]


Change = Callable[[Arrays], Any]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.update(unknown=a["tasks"]), ValueError),
        (lambda a: a.update(input_ids=a["input_ids"].astype(np.int64)), ValueError),
        (lambda a: a.update(prompt_embedding_table=a["prompt_embedding_table"].astype(np.float16)), ValueError),
        (lambda a: a.update(prompt_embedding_table=a["prompt_embedding_table"][:, 1:].copy()), RuntimeError),
        (lambda a: a.update(prompt_embedding_table=np.zeros((17, WIDTH), np.float32)), RuntimeError),
        (lambda a: a.update(mrope_rotary_cos_sin=a["mrope_rotary_cos_sin"][:, 2:].copy()), RuntimeError),
        (lambda a: a.update(input_ids=np.zeros(POSITIONS + 1, np.int32)), RuntimeError),
        (lambda a: a.update(context_lengths=int32(14, 14)), RuntimeError),
    ],
)
def test_what_infer_shapes_refuses(prompt: Prompt, change: Change, error: type[Exception]) -> None:
    change(prompt.arrays)
    with pytest.raises(error):
        prompt.run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(input_ids=a["input_ids"] + VOCABULARY), "the vocabulary and the table end at 108"),
        (lambda a: a.update(prompt_vocab_size=int32(3)), "the table end at 99"),
        (lambda a: a.update(context_lengths=int32(27)), "context_lengths is"),
        (lambda a: a.update(host_context_lengths=int32(27)), "host_context_lengths is"),
        (lambda a: a.update(last_token_ids=int32(27)), "last_token_ids is"),
        (lambda a: a.update(host_request_types=int32(1)), "host_request_types is"),
        (lambda a: a.update(tasks=a["tasks"] + 1), "rows of another prompt"),
        (lambda a: a.update(host_max_attention_window_sizes=int32(*[8] * LAYERS)), "attention slides"),
        (lambda a: a.update(host_context_progress=np.ones(1, np.int64)), "host_context_progress"),
        (lambda a: a.update(mrope_rotary_cos_sin=0 * a["mrope_rotary_cos_sin"]), "no .cos, sin. pairs"),
    ],
)
def test_values_that_give_garbage(prompt: Prompt, change: Change, message: str) -> None:
    change(prompt.arrays)
    with pytest.raises(Misuse, match=message):
        prompt.run()


def test_an_input_left_out_is_a_refusal(prompt: Prompt) -> None:
    del prompt.arrays["mrope_position_deltas"]
    with pytest.raises(AssertionError, match="shapes of .'mrope_position_deltas'. are not set"):
        prompt.run()


def test_inputs_that_contradict_each_other_are_a_refusal(prompt: Prompt) -> None:
    prompt.arrays["tasks"] = int32(0)
    with pytest.raises(AssertionError, match="contradict"):
        prompt.run()


@pytest.mark.parametrize("name", ["host_context_lengths", "input_ids"])
def test_memory_in_the_wrong_place(prompt: Prompt, name: str) -> None:
    prompt.run()
    array = prompt.arrays[name]
    places = {**prompt.places, name: prompt.upload(array) if name in HOST else array.ctypes.data}
    with pytest.raises(Misuse, match=f"{name}.*(not the host's memory|is not allocated)"):
        prompt.session.run(places, {"hidden_states": prompt.memory[-1]}, prompt.stream.handle)


def test_a_host_input_that_changes_before_the_run_is_done(prompt: Prompt) -> None:
    prompt.run()
    output = prompt.allocate(4 * WIDTH * len(prompt.arrays["input_ids"]))
    assert prompt.session.run(prompt.places, {"hidden_states": output}, prompt.stream.handle)
    prompt.arrays["host_context_lengths"][0] = 1
    with pytest.raises(Misuse, match="host_context_lengths changed"):
        prompt.stream.synchronize()


def test_an_input_without_content(prompt: Prompt) -> None:
    prompt.run()
    prompt.places["prompt_embedding_table"] = prompt.allocate(prompt.arrays["prompt_embedding_table"].nbytes)
    with pytest.raises(Misuse, match="prompt_embedding_table .* None were written"):
        prompt.session.run(prompt.places, {"hidden_states": prompt.memory[-2]}, prompt.stream.handle)
        prompt.stream.synchronize()


@pytest.mark.parametrize(("change", "why"), [({"version": "10.0"}, "tensorrt"), ({"capability": "9.0"}, "capability")])
def test_an_engine_for_something_else(
    monkeypatch: pytest.MonkeyPatch, engine: bytes, change: dict[str, str], why: str
) -> None:
    gpu = Gpu(**change)  # type: ignore[arg-type]
    gpu.install(monkeypatch)
    package: Any = install_runtime(gpu, monkeypatch)
    cuda.use(0)
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'create_execution_context'"):
        package.runtime.Session.from_serialized_engine(engine)
    assert gpu.refused[0].startswith(why)


def test_an_engine_of_another_version_of_the_package(
    plain: Gpu, monkeypatch: pytest.MonkeyPatch, engine: bytes
) -> None:
    package: Any = install_runtime(plain, monkeypatch, version="1.1.0")
    cuda.use(0)
    with pytest.raises(AttributeError):
        package.runtime.Session.from_serialized_engine(engine)
    assert plain.refused == ["version is 1.2.1, expected 1.1.0"]
