"""The language model as a real engine of TensorRT-LLM: its inputs, its hidden states, an edit, time and memory."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qie.compiler.metrics.error import psnr_db, relative_l2
from qie.compiler.selftest.recording import Run
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.editing.editor import Editor
from qie.engines.sessions import cuda
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.session import Session
from tests.support.gpu_bundles import edit_request
from tests.support.images import smooth_image
from tests.support.trtllm.config import read_config
from tests.support.trtllm.prompt import hidden_states
from tests.support.trtllm.tensors import HOST, inputs_of

FROM_FLOAT32 = {"none": 0.03, "fp8": 0.12, "int8-smooth": 0.08, "w8a16": 0.05, "w4a16": 0.35}
"""Relative L2 distance of prompt embeds from float32 on the CPU. On random weights the schemes alone cost 0.063, 0.030,
0.013 and 0.2 (tests/compiler/backends/tensorrt_llm/test_parity.py); bfloat16 is given 0.03."""

FROM_THE_READER = {"none": 0.03, "fp8": 0.05, "int8-smooth": 0.05, "w8a16": 0.03, "w4a16": 0.03}
"""The same from the reader's result for the checkpoint that the engine was built from: what is left is bfloat16, and
quantized inputs that it moves to the next step."""

BOUND_DB = {"w4a16": 15.0}
"""PSNR of an edit in dB; elsewhere 28, the default gate of recipes. 4-bit random weights move embeddings by a fifth."""

REPEATS = 20

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64"}
"""Members of TensorRT's DataType."""


def record_of(bundle: Bundle) -> EngineRecord:
    (record,) = [e for e in bundle.manifest.engines if e.component == "language"]
    return record


@pytest.fixture
def session(on_trtllm: Bundle, measured: Callable[[str], None]) -> Iterator[Session]:
    record = record_of(on_trtllm)
    device = open_device([record])
    assert device is not None
    before, _ = cuda.memory()
    started = time.perf_counter()
    session = load(on_trtllm.path, record, device)
    seconds = time.perf_counter() - started
    after, _ = cuda.memory()
    measured(f"loaded in {seconds:.2f} s, {(before - after) / 2**20:.0f} MiB of GPU memory")
    yield session
    session.close()
    gc.collect()
    device.close()


def embeds(session: Session, run: Run) -> NDArray[np.float32]:
    (name,) = run.outputs
    output = session.upload(np.zeros_like(run.outputs[name]))
    session.run({name: session.upload(array) for name, array in run.inputs.items()}, {name: output})
    return np.array(session.download(output), np.float32)


def test_the_engine_is_tensorrt_llms(on_trtllm: Bundle) -> None:
    assert record_of(on_trtllm).backend == "tensorrt-llm"


def test_the_inputs_are_those_of_the_stand_in(
    on_trtllm: Bundle, llm_checkpoint: Path, session: Session, measured: Callable[[str], None]
) -> None:
    """Names, dtypes, dims and ranges; TensorRT takes all of them for inputs in the GPU's memory."""
    trt, runtime = import_module("tensorrt"), import_module("tensorrt_llm.runtime")
    path = on_trtllm.path / record_of(on_trtllm).path
    engine = runtime.Session.from_serialized_engine(path.read_bytes()).engine
    real = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            ranges = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            dtype = engine.get_tensor_dtype(name).name
            real[name] = (DTYPES.get(dtype, dtype), len(engine.get_tensor_shape(name)), ranges)
    built = json.loads(path.with_name("config.json").read_text())["build_config"]
    expected = inputs_of(read_config(llm_checkpoint), built)
    measured(f"inputs: {', '.join(sorted(real))}")
    assert real == {t.name: (t.dtype, len(t.dims), (t.low, t.opt, t.high)) for t in expected}
    elsewhere = [name for name in real if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]
    measured(f"declared in host memory: {elsewhere}; read there by the plugin: {sorted(HOST & real.keys())}")
    assert elsewhere == []


def test_prompt_embeds(
    session: Session, llm_checkpoint: Path, scheme: str, language_run: Run, measured: Callable[[str], None]
) -> None:
    (expected,) = language_run.outputs.values()
    found = embeds(session, language_run)
    assert found.shape == expected.shape
    assert expected.std() > 0
    by_reader = hidden_states(llm_checkpoint, language_run.inputs)[-expected.shape[1] :]
    distances = relative_l2(found, expected), relative_l2(found[0], by_reader)
    measured("{:.4f} from float32, {:.4f} from the reader".format(*distances))
    assert distances[0] < FROM_FLOAT32[scheme]
    assert distances[1] < FROM_THE_READER[scheme]


def test_a_prompt_twice_gives_the_same_bytes(session: Session, language_run: Run) -> None:
    assert np.array_equal(embeds(session, language_run), embeds(session, language_run))


def test_time(session: Session, language_run: Run, measured: Callable[[str], None]) -> None:
    embeds(session, language_run)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        embeds(session, language_run)
        seconds.append(time.perf_counter() - started)
    tokens = language_run.inputs["input_ids"].shape[1]
    measured(f"{1000 * np.median(seconds):.2f} ms for {tokens} tokens, copies included, median of {REPEATS}")


def test_an_edit_is_close_to_the_cpus(
    on_trtllm: Bundle, cpu_bundle: Bundle, scheme: str, measured: Callable[[str], None]
) -> None:
    images = []
    for bundle in (on_trtllm, cpu_bundle):
        editor = Editor(bundle)
        images.append(np.asarray(editor.edit(edit_request()).images[0]))
        editor.close()
        gc.collect()
    decibels = psnr_db(*images)
    measured(f"{decibels:.1f} dB (standard deviation {images[1].std():.1f})")
    assert images[1].std() > 5  # a flat image would prove nothing
    assert decibels >= BOUND_DB.get(scheme, 28.0)


def test_two_instructions(on_trtllm: Bundle) -> None:
    """Prompts of one edit run one after the other, and a longer one after a shorter one."""
    editor = Editor(on_trtllm)
    images = [smooth_image(150, 90), smooth_image(60, 80, 1)]
    request = edit_request(images=images, instructions=["make it red", "add snow and a dog"], seeds=[1], steps=2)
    together = [np.asarray(image) for image in editor.edit(request).images]
    editor.close()
    assert len(together) == 2
    assert not np.array_equal(*together)  # of one seed: it is the prompts that differ
