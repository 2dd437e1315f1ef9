"""vLLM's engine in this process: one for each text encoder, which the sessions of its components share.

Shape suffixes: S prompt tokens, P patches, V image tokens, X values of a patch, D width of the language model.
"""

import contextlib
import functools
import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.backends import install_command
from qie.engines.errors import BackendMissingError, BundleError, EngineError, QieError, first_line
from qie.engines.sessions.vllm.prompt import Grid, Prompt
from qie.engines.sessions.vllm.settings import SETTINGS_FILE, TASK, arguments, read_settings

__all__ = ["ENVIRONMENT", "Engine", "open_engine"]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""Variables that vLLM reads, set where they are not set already: the engine in this process, whose threads stay where
they are (bound ones would bind those of other engines too), without reports to anybody and without the network."""


@dataclass(frozen=True, slots=True)
class _Key:
    folder: Path
    dtype: str
    index: int | None


@dataclass(slots=True)
class _Shared:
    engine: "Engine"
    users: int


_lock = threading.Lock()
_engines: dict[_Key, _Shared] = {}


def open_engine(folder: Path, dtype: str, index: int | None, threads: int) -> tuple["Engine", Callable[[], None]]:
    """The engine of the text encoder in ``folder``, and what gives it back; the last to do so closes it.

    Args:
        folder: of the text encoder.
        dtype: in which vLLM computes.
        index: CUDA index of the GPU; None on a CPU.
        threads: on a CPU; 0 for PyTorch's default.

    Raises:
        BackendMissingError: vLLM does not load, or the installed one is for another device.
        BundleError: vLLM does not load the text encoder.
        EngineError: memory ran out, or another text encoder is loaded: engines of vLLM share the state of a process,
            and one that ends takes it away from the others.
    """
    key = _Key(folder.resolve(), dtype, index)
    with _lock:
        if other := next((each for each in _engines if each != key), None):
            raise EngineError(
                f"vLLM has {other.folder} loaded, and a process takes one text encoder at a time; close its editor "
                "first, or use a process of its own"
            )
        if key not in _engines:
            _engines[key] = _Shared(Engine(key.folder, dtype, index, threads), 0)
        shared = _engines[key]
        shared.users += 1
    return shared.engine, functools.partial(_give_back, key, shared)


def _give_back(key: _Key, shared: _Shared) -> None:
    with _lock:
        shared.users -= 1
        if shared.users:
            return
        if _engines.get(key) is shared:
            del _engines[key]
        shared.engine.close()


class Engine:
    """A text encoder in vLLM."""

    def __init__(self, folder: Path, dtype: str, index: int | None, threads: int) -> None:
        """Load the text encoder in ``folder``; see ``open_engine``."""
        self.settings = read_settings(folder / SETTINGS_FILE)
        self._busy = threading.Lock()  # sessions of several editors may share it
        self._llm: Any = None
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        target = "cpu" if index is None else "gpu"
        self._vllm, self._torch = _package("vllm", target), _package("torch", target)
        self._check_device(index)
        values = arguments(self.settings, dtype)
        if index is not None:  # vLLM wants that share of the whole memory free at the start, and takes what it needs
            needed = sum(file.stat().st_size for file in folder.glob("*.safetensors")) + self.settings.cache_bytes
            values["gpu_memory_utilization"] = self._share(needed)
        elif threads:
            self._torch.set_num_threads(threads)
        try:
            with _quiet():
                self._llm = self._vllm.LLM(str(folder), **values)
        except Exception as problem:  # vLLM documents none
            self.close()
            raise self._unloadable(folder, problem) from problem

    def hidden_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """The hidden states float32 [S, D] of all tokens of ``prompt``, behind the last norm.

        Raises:
            EngineError: vLLM failed or memory ran out.
        """
        torch = self._torch
        images = {
            "image_embeds": torch.from_numpy(np.concatenate(prompt.embeds)).to(self._dtype),
            "image_grid_thw": torch.tensor(prompt.grids, dtype=torch.int64),
        }
        inputs = {"prompt_token_ids": prompt.token_ids, "multi_modal_data": {"image": images}}
        with self._failing("language"):
            (output,) = self._llm.encode([inputs], pooling_task=TASK, use_tqdm=False)
            ids, hidden = list(output.prompt_token_ids), self._numpy(output.outputs.data)
        if ids != prompt.expanded_ids or len(hidden) != len(ids):
            raise EngineError(
                f"vLLM computed {len(hidden)} hidden states of a prompt of {len(ids)} tokens, expected those of "
                f"{len(prompt.expanded_ids)}; install the version of vLLM that qie is tested with, as docs/language.md "
                "says"
            )
        return hidden

    def image_embeds(self, patches_PX: NDArray[np.float32], grids: list[Grid]) -> NDArray[np.float32]:
        """The embeddings float32 [V, D] of images whose patches are in the order of the image processor.

        Raises:
            EngineError: vLLM failed or memory ran out.
        """
        torch, numpy = self._torch, self._numpy

        def embed(model: Any) -> NDArray[np.float32]:
            tower = model.visual
            weights = next(tower.parameters())
            with torch.inference_mode():
                patches = torch.from_numpy(np.ascontiguousarray(patches_PX)).to(weights.device, weights.dtype)
                return numpy(tower(patches, grid_thw=[list(grid) for grid in grids]))

        with self._failing("vision"):
            (embeds,) = self._llm.apply_model(embed)
        result: NDArray[np.float32] = embeds
        return result

    def close(self) -> None:
        """Release the engine and its memory. Closing twice is allowed."""
        if self._llm is not None:
            with _quiet(), contextlib.suppress(Exception):
                self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    @property
    def _dtype(self) -> Any:
        return self._llm.llm_engine.model_config.dtype

    def _numpy(self, tensor: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.detach().to("cpu", self._torch.float32).numpy()
        return array

    def _check_device(self, index: int | None) -> None:
        """Check that vLLM computes on the CPU, or on the GPU ``index``.

        Raises:
            BackendMissingError: it does not.
        """
        on_cpu = bool(import_module("vllm.platforms").current_platform.is_cpu())
        if on_cpu != (index is None):
            found, wanted = ("CPU", "GPU") if on_cpu else ("GPU", "CPU")
            command = install_command("vllm", "cpu" if index is None else "gpu")
            raise BackendMissingError(
                f"the engine is for a {wanted}, and the vLLM that is installed here is for a {found}; run `{command}`"
            )
        if index:
            raise BackendMissingError(
                f"vLLM in this process takes the first GPU, and GPU {index} was chosen; set CUDA_VISIBLE_DEVICES to "
                "it, or run vLLM as a server",
                option="device",
            )

    def _share(self, needed: int) -> float:
        """Part of the GPU's memory in which ``needed`` bytes fit, with a tenth more."""
        free, total = self._torch.cuda.mem_get_info()
        if needed > free:
            raise EngineError(
                f"the text encoder takes {needed:,} bytes, the GPU has {free:,} of {total:,} bytes free; build with "
                'residency = "sequential", or for a larger GPU'
            )
        return min(1.1 * needed, free) / total

    def _unloadable(self, folder: Path, problem: Exception) -> QieError:
        reason = first_line(problem)
        if _is_memory(problem):
            return EngineError(
                f'memory ran out while vLLM loaded {folder} ({reason}); build with residency = "sequential", or for a '
                "machine with more memory"
            )
        return BundleError(
            f"vLLM cannot load {folder} ({reason}); build the bundle again with `qie build`, or install the version of "
            "vLLM that qie is tested with, as docs/language.md says"
        )

    @contextlib.contextmanager
    def _failing(self, component: str) -> Iterator[None]:
        """Around a call of vLLM.

        Raises:
            EngineError: it failed.
        """
        try:
            with self._busy, _quiet():
                yield
        except Exception as problem:  # vLLM documents none
            fix = "use a shorter instruction or fewer images" if _is_memory(problem) else "see what it printed"
            raise EngineError(f"vLLM failed in {component} ({first_line(problem)}); {fix}") from problem


def _is_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError) or "memory" in str(problem).lower()


def _package(name: str, target: str) -> Any:
    """The module ``name``; what its import prints goes to stderr.

    Raises:
        BackendMissingError: it does not load.
    """
    try:
        with _quiet():
            return import_module(name)
    except (ImportError, OSError, RuntimeError) as problem:
        raise BackendMissingError(
            f"vllm is installed but does not load ({first_line(problem)}); install it again with "
            f"`{install_command('vllm', target)}`"
        ) from problem


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is printed goes to stderr; warnings of packages about each other are not shown."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
