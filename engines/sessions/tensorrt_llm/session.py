"""The language model as an engine of TensorRT-LLM, on one GPU: a prompt in, its last hidden states out.

An edit runs it once or twice, so tensors are arrays of the host, and a run copies what the engine reads and writes.
"""

import contextlib
import mmap
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bfloat16 import narrow
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import BackendMissingError, BundleError, EngineError, RequestError, first_line
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Device, DeviceTensor
from qie.engines.sessions.host_tensors import HostTensors
from qie.engines.sessions.tensorrt_llm.config import read_config
from qie.engines.sessions.tensorrt_llm.feed import ON_HOST, OUTPUT, engine_inputs

__all__ = ["TensorRtLlmSession"]

_CONFIG = "config.json"


class TensorRtLlmSession(HostTensors):
    """One engine in the memory of a GPU."""

    def __init__(self, folder: Path, record: EngineRecord, device: Device) -> None:
        """Load the engine of ``record`` in the bundle ``folder``; its file is mapped, not read into memory.

        Raises:
            BackendMissingError: TensorRT-LLM does not load.
            BundleError: the file is not an engine of the installed TensorRT-LLM, or takes inputs that are unknown.
            EngineError: the GPU is out of memory.
        """
        super().__init__(record)
        path = folder / record.path
        self._record, self._device = record, device
        self._config = read_config(path.with_name(_CONFIG))
        device.use()
        self._runtime = _runtime()
        self._session: Any = self._load(path)
        try:
            self._inputs = self._check_tensors(path)
        except BaseException:
            self._session = None
            raise

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Compute ``prompt_embeds`` float32 [1, L, D] of one prompt of S tokens: the last L of its hidden states.

        Raises:
            BundleError: the tokenizer is of another model.
            RequestError: the prompt is longer than the engine takes, or has more image tokens.
            EngineError: TensorRT-LLM failed, or the GPU is out of memory.
        """
        self.check_tensors(inputs, outputs)
        target_1LD = outputs["prompt_embeds"]
        tokens, images = inputs["input_ids"].shape[1], len(inputs["image_embeds"])
        for what, count, most in (
            ("tokens", tokens, self._config.positions),
            ("image tokens", images, self._config.table_rows),
        ):
            if count > most:
                raise RequestError(
                    f"the prompt has {count} {what}, the engine takes {most}; shorten the instruction or use fewer "
                    "images, or build with a larger shapes.prompt_tokens.max in the recipe",
                    option="instructions",
                )
        largest = int(inputs["input_ids"].max())
        if largest >= self._config.vocabulary:
            raise BundleError(
                f"the tokenizer makes the id {largest}, and the language model has {self._config.vocabulary} of them; "
                "build the bundle again from a checkpoint whose tokenizer belongs to it"
            )
        assert len(target_1LD) == 1, f"{len(target_1LD)} prompts in a run, expected 1"
        hidden_SD = self._hidden_states(engine_inputs(inputs, self._config))
        np.copyto(target_1LD[0], hidden_SD[tokens - target_1LD.shape[1] :])

    def close(self) -> None:
        """Release the engine once the GPU is done. Closing twice is allowed."""
        if self._session is not None:
            self._device.use()
            self._device.synchronize()
            self._session = None

    def _hidden_states(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the engine: float32 [S, D]."""
        device, session = self._device, self._session
        device.use()
        addresses: dict[str, int] = {}
        held: list[NDArray[Any] | DeviceTensor] = []
        described = []
        for name, dtype in self._inputs.items():
            array = np.ascontiguousarray(arrays[name])
            if name == "prompt_embedding_table" and dtype.name == "BF16":
                array = narrow(array)
            tensor = array if name in ON_HOST else device.upload(array)
            held.append(tensor)
            addresses[name] = array.ctypes.data if isinstance(tensor, np.ndarray) else tensor.address
            described.append(self._runtime.TensorInfo(name, dtype, array.shape))
        try:
            (output,) = session.infer_shapes(described)
            hidden = device.empty(tuple(output.shape), np.float32)
            done: list[bool] = []
            device.queue(lambda: done.append(session.run(addresses, {OUTPUT: hidden.address}, int(device.stream))))
        except (ValueError, RuntimeError, AssertionError) as problem:
            raise EngineError(self._failed(first_line(problem))) from problem
        if not done[0]:
            raise EngineError(self._failed("its run was refused"))
        return np.asarray(device.download(hidden), np.float32)

    def _load(self, path: Path) -> Any:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                session = self._runtime.Session.from_serialized_engine(content)
            if session is None or session.engine is None:
                raise RuntimeError("TensorRT gives no engine; it logged the reason")
        except (OSError, ValueError, RuntimeError, AttributeError, AssertionError) as problem:
            reason, (free, total) = first_line(problem), cuda.memory()
            size = sum(file.bytes for file in self._record.files)
            if size > free or "memory" in reason.lower():  # it logs the reason and raises another one
                raise EngineError(
                    f"language has {size:,} bytes, the GPU {free:,} of {total:,} bytes free ({reason}); build with "
                    'residency = "sequential", or for a larger GPU'
                ) from problem
            raise BundleError(
                f"tensorrt-llm cannot load {path} ({reason}); build the bundle again with `qie build`, and see "
                "`qie doctor` on GPU and driver"
            ) from problem
        return session

    def _check_tensors(self, path: Path) -> dict[str, Any]:
        """The engine's inputs by name with their dtypes, all of which ``engine_inputs`` gives."""
        engine = self._session.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: engine.get_tensor_dtype(name) for name in names}
        known = engine_inputs(_SMALLEST, self._config)
        unknown = sorted(name for name in names if name not in known and name != OUTPUT)
        if unknown or OUTPUT not in names or dtypes[OUTPUT].name != "FLOAT":
            what = f"takes {', '.join(unknown)}" if unknown else f"has no float32 {OUTPUT}"
            raise BundleError(
                f"{path} {what}, so it was not built from the checkpoint in its bundle; build the bundle again with "
                "`qie build`"
            )
        return {name: dtype for name, dtype in dtypes.items() if name != OUTPUT}

    def _failed(self, reason: str) -> str:
        return f"tensorrt-llm failed in language ({reason}); use a shorter instruction or fewer images"


_SMALLEST: dict[str, NDArray[Any]] = {
    "input_ids": np.zeros((1, 1), np.int64),
    "image_embeds": np.zeros((1, 1), np.float32),
    "image_index": np.full((1, 1), -1, np.int64),
    "position_ids": np.zeros((3, 1, 1), np.int64),
}
"""A prompt of one token, whose engine inputs have the names of all."""


def _runtime() -> Any:
    """TensorRT-LLM's runtime; what its import prints goes to stderr.

    Raises:
        BackendMissingError: it does not load.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import_module("tensorrt_llm")
            return import_module("tensorrt_llm.runtime")
    except (ImportError, OSError, RuntimeError) as problem:
        raise BackendMissingError(
            f"tensorrt-llm is installed but does not load ({first_line(problem)}); install it again with "
            "`pip install 'qie[trtllm]'`"
        ) from problem
