"""ICudaEngine and IExecutionContext of a stand-in engine of TensorRT-LLM, over the memory of a fake GPU.

Sources of what a run reads and of what goes wrong in it: cpp/tensorrt_llm/plugins, gptAttentionPlugin and -Common (host
inputs, windows, sinks, progress, requests), kernels of the rotary embedding (row of the table by token, stride
``max_position_embeddings``), layers/embedding.py (PromptTuningEmbedding), generation_mixin.py (profiles).
"""

import ctypes
import functools
import math
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.fake_gpu.device import Device
from tests.support.fake_gpu.handles import Misuse
from tests.support.fake_gpu.owned import Owned
from tests.support.fake_gpu.types import DataType, Dims, Location, Mode, Strategy, address
from tests.support.trtllm.checkpoint import make_decoder
from tests.support.trtllm.config import parse_config
from tests.support.trtllm.parameters import load
from tests.support.trtllm.stored import parse_tensors
from tests.support.trtllm.tensors import HOST, UNREAD, parse_tensor

Arrays = dict[str, NDArray[Any]]

TRT = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
}
NUMPY: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
PERF_KNOBS = 2
"""Knobs that have a meaning: multi-block mode and float32 accumulation, each 0, 1, or -1 for the default."""


class LlmEngine(Owned):
    """ICudaEngine; its weights are in the GPU's memory as long as it lives."""

    def __init__(self, gpu: Device, runtime: Any, header: dict[str, Any], weights: bytes) -> None:
        self.gpu, self.runtime, self.header = gpu, runtime, header
        self.held = len(weights)
        gpu.hold(self.held)
        self.config = parse_config(header["pretrained_config"])
        self.inputs = {tensor.name: tensor for tensor in map(parse_tensor, header["inputs"])}
        self.outputs = {tensor.name: tensor for tensor in map(parse_tensor, header["outputs"])}
        self.tensors = {**self.inputs, **self.outputs}
        self.decoder = None
        if self.config.tp == 1:
            self.decoder = make_decoder(self.config, [load(parse_tensors(weights), self.config)])
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = 1
        gpu.log.append(("load", "language"))

    def destroy(self) -> None:
        self.gpu.in_use -= self.held

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode | None:
        """None stands for TensorIOMode.NONE, which a name has that the engine does not know."""
        return None if name not in self.tensors else Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def get_tensor_location(self, name: str) -> Location:
        """DEVICE even for what the plugin reads on the host: no location is declared in the network."""
        return Location.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return TRT[self.tensors[name].dtype]

    def get_tensor_shape(self, name: str) -> Dims:
        if name not in self.tensors:
            return Dims()
        tensor = self.tensors[name]
        fixed = (low == high and name in self.inputs for low, high in zip(tensor.low, tensor.high, strict=True))
        return Dims(low if same else dim for low, dim, same in zip(tensor.low, tensor.dims, fixed, strict=True))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        assert profile_index == 0
        tensor = self.inputs[name]
        return [Dims(tensor.low), Dims(tensor.opt), Dims(tensor.high)]

    @property
    def device_memory_size_v2(self) -> int:
        """Activations of the largest prompt: invented, but larger for more tokens."""
        return 1000 + 8 * self.header["build_config"]["max_num_tokens"] * self.config.width

    device_memory_size = device_memory_size_v2

    def create_execution_context(self, strategy: Any = Strategy.STATIC) -> "LlmContext | None":
        """A context with memory of its own unless the application manages it; None where memory is short."""
        own = 0 if strategy is Strategy.USER_MANAGED else self.device_memory_size_v2
        if self.gpu.in_use + own > self.gpu.memory_bytes:
            self.runtime.refuse("Requested amount of GPU memory could not be allocated")
            return None
        self.gpu.log.append(("context", "language"))
        return LlmContext(self, own)


class LlmContext(Owned):
    """IExecutionContext."""

    def __init__(self, engine: LlmEngine, own: int) -> None:
        self.engine, self.gpu, self.own = engine, engine.gpu, own
        self.gpu.hold(own)
        self.arena: tuple[int, int] | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.in_flight = 0
        self.profile: int | None = None

    def destroy(self) -> None:
        self.gpu.in_use -= self.own
        if self.in_flight and self.gpu.broken is None:
            self.gpu.crash("a context is destroyed while a run of it is in flight")

    @property
    def active_optimization_profile(self) -> int:
        return -1 if self.profile is None else self.profile

    def refuse(self, text: str) -> bool:
        self.engine.runtime.refuse(f"language: {text}")
        return False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        address(stream_handle)
        if profile_index != 0:
            raise RuntimeError("Error in set optimization profile async.")
        self.profile, self.shapes = 0, {}
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        shape = tuple(shape)
        if name not in self.engine.inputs:
            return self.refuse(f"{name} is no input")
        tensor = self.engine.inputs[name]
        low, high = tensor.low, tensor.high
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return self.refuse(f"{name}: {shape} is not from {low} to {high}")
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        if name in self.engine.inputs:
            return Dims(self.shapes.get(name, tuple(self.engine.get_tensor_shape(name))))
        if name not in self.engine.outputs:
            return Dims()
        return Dims((self.shapes.get("input_ids", (-1,))[0], self.engine.config.width))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.tensors:
            return self.refuse(f"{name} is no tensor of the engine")
        self.addresses[name] = address(memory)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.arena = (address(memory), address(size))

    def execute_async_v3(self, stream_handle: Any) -> bool:
        stream = self.gpu.stream(address(stream_handle))
        if missing := self.infer_shapes():
            return self.refuse(f"shapes of {missing} are not set")
        if missing := sorted(self.engine.tensors.keys() - self.addresses.keys()):
            return self.refuse(f"addresses of {missing} are not set")
        tokens = {self.shapes[name] for name in ("input_ids", "position_ids", "tasks") if name in self.shapes}
        if len(tokens) > 1:
            return self.refuse(f"the dims of inputs contradict each other: {tokens}")
        if not self.own and (self.arena is None or self.arena[1] < self.engine.device_memory_size_v2):
            raise Misuse("a run without enough memory for activations")
        if stream.capture is not None:
            raise Misuse("a plugin that reads host memory is captured: later launches would not read it again")
        host = {name: self._host(name) for name in self.engine.inputs if name in HOST}
        for name in self.engine.tensors.keys() - HOST:
            self.gpu.memory(self.addresses[name], self._bytes(name), name)
        self._check_host(host)
        self.in_flight += 1
        work = functools.partial(self._compute, dict(self.shapes), dict(self.addresses), host)
        self.gpu.enqueue(stream, "run language", work)
        return True

    def _bytes(self, name: str) -> int:
        return math.prod(self.get_tensor_shape(name)) * NUMPY[self.engine.tensors[name].dtype].itemsize

    def _host(self, name: str) -> NDArray[Any]:
        """The values of an input that the plugin reads now."""
        place = self.addresses[name]
        if place == 0 or any(start <= place < start + len(block) for start, block in self.gpu.blocks.items()):
            raise Misuse(f"{name} is at {place:#x}, which is not the host's memory: the plugin reads it there")
        content = ctypes.string_at(place, self._bytes(name))
        return np.frombuffer(content, NUMPY[self.engine.inputs[name].dtype]).reshape(self.shapes[name])

    def _check_host(self, host: Arrays) -> None:
        """What the plugin believes without a check."""
        (tokens,) = self.shapes["input_ids"]
        expected = {
            "host_request_types": [0],
            "host_context_lengths": [tokens],
            "host_context_progress": [0],
            "host_sink_token_length": [0],
        }
        if self.engine.config.tp > 1:
            raise Misuse("a rank runs alone: its first sum over ranks waits for the others for ever")
        for name, values in expected.items():
            if host[name].tolist() != values:
                raise Misuse(f"{name} is {host[name].tolist()}, expected {values}")
        windows = host["host_max_attention_window_sizes"]
        if windows.min() < tokens:
            raise Misuse(f"host_max_attention_window_sizes is {windows.tolist()} for {tokens} tokens: attention slides")
        knobs = host["host_runtime_perf_knobs"]
        if not set(knobs[:PERF_KNOBS].tolist()) <= {-1, 0, 1} or set(knobs[PERF_KNOBS:].tolist()) - {-1}:
            raise Misuse(f"host_runtime_perf_knobs is {knobs.tolist()}")

    def _compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], host: Arrays) -> None:
        """The run itself, when its turn has come."""
        self.in_flight -= 1
        for name, before in host.items():
            if ctypes.string_at(addresses[name], before.nbytes) != before.tobytes():
                raise Misuse(f"{name} changed, or was freed, while the run was in flight")
        values: Arrays = {}
        for name in self.engine.inputs.keys() - HOST - UNREAD:
            dtype = NUMPY[self.engine.inputs[name].dtype]
            size = math.prod(shapes[name]) * dtype.itemsize
            if self.gpu.written.get(addresses[name]) != size:
                written = self.gpu.written.get(addresses[name])
                raise Misuse(f"language reads {name} of {size} bytes, {written} were written")
            content = self.gpu.memory(addresses[name], size, name).copy()
            values[name] = content.view(dtype).reshape(shapes[name])
        hidden = self._hidden(values)
        (output,) = self.engine.outputs.values()
        result = np.ascontiguousarray(hidden.astype(NUMPY[output.dtype]))
        self.gpu.memory(addresses[output.name], result.nbytes, output.name)[:] = result.view(np.uint8).reshape(-1)
        self.gpu.written[addresses[output.name]] = result.nbytes

    def _hidden(self, values: Arrays) -> NDArray[np.float32]:
        config, decoder, ids_S = self.engine.config, self.engine.decoder, values["input_ids"]
        assert decoder is not None
        tokens, built = len(ids_S), self.engine.header["build_config"]
        if tokens > min(config.positions, built["max_seq_len"], built["max_input_len"]):
            raise Misuse(f"{tokens} tokens, more than the positions, max_seq_len or max_input_len of the engine")
        for name in ("context_lengths", "last_token_ids"):
            if name in values and values[name].tolist() != [tokens]:
                raise Misuse(f"{name} is {values[name].tolist()}, expected [{tokens}]")
        table, size = np.zeros((0, config.width), np.float32), 0
        if "prompt_embedding_table" in values:
            table, size = values["prompt_embedding_table"].astype(np.float32), int(values["prompt_vocab_size"][0])
            if values["tasks"].any():
                raise Misuse(f"tasks are {set(values['tasks'].tolist())}: rows of another prompt")
        last = config.vocabulary + min(size, len(table))
        if ids_S.min() < 0 or ids_S.max() >= last:
            raise Misuse(f"ids go from {ids_S.min()} to {ids_S.max()}, the vocabulary and the table end at {last}")
        rotary = values["mrope_rotary_cos_sin"].reshape(config.positions, -1, 2)
        length = np.square(rotary[:tokens].astype(np.float64)).sum(-1)
        if not np.allclose(length, 1, atol=1e-3):
            raise Misuse("mrope_rotary_cos_sin has no (cos, sin) pairs")
        return decoder(decoder.embed(ids_S, table), rotary)
