"""Loads engines: a session for each, and the device that sessions on a GPU share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from qie.engines.backends import BACKENDS, available, install_command
from qie.engines.bundle.manifest import EngineRecord, Specialization
from qie.engines.errors import BackendMissingError
from qie.engines.machine import choose_gpu, this_machine
from qie.engines.sessions.parts import PartsSession
from qie.engines.sessions.session import Session

if TYPE_CHECKING:
    from qie.engines.sessions.device import Device

__all__ = ["SESSIONS", "load", "load_parts", "open_device"]


def open_device(
    engines: Iterable[EngineRecord],
    *,
    device: int | None = None,
    cuda_graphs: bool | None = None,
    specialization: Specialization = "none",
    unloads: bool = False,
) -> Device | None:
    """The device that the sessions of ``engines`` share on a GPU; None where none of them needs one.

    Args:
        engines: of one bundle.
        device: CUDA index of the GPU; None for the first that fits.
        cuda_graphs: see ``DeviceOptions``, as for the next two.
        specialization: see ``DeviceOptions``.
        unloads: see ``DeviceOptions``.

    Raises:
        EngineMismatchError: CUDA offers no GPU of the engines' compute capability, or ``device`` is another one.
    """
    sharing = [engine for engine in engines if BACKENDS[engine.backend].shares_device]
    if not sharing:
        return None
    from qie.engines.sessions.device import Device, DeviceOptions

    options = DeviceOptions(
        cuda_graphs=cuda_graphs,
        specialization=specialization,
        unloads=unloads,
        arena_bytes=max(engine.activation_bytes or 0 for engine in sharing),
    )
    return Device(sharing[0].compute_capability, options, device=device)


def load(
    folder: Path, engine: EngineRecord, device: Device | None = None, index: int | None = None, threads: int = 0
) -> Session:
    """Load ``engine`` of the bundle ``folder`` with its backend.

    Args:
        folder: of the bundle.
        engine: of the bundle.
        device: of ``open_device``.
        index: CUDA index of the GPU, for a backend that shares no device; None for the first that fits.
        threads: of an engine on the CPU; 0 for one per core.

    Raises:
        BackendMissingError: the backend's package is not installed.
        EngineMismatchError: there is no such GPU.
        BundleError: the backend cannot load the engine.
        EngineError: the GPU is out of memory.
    """
    if not available(engine.backend):
        known = engine.backend in BACKENDS
        install = install_command(engine.backend, engine.compute_capability) if known else "pip install --upgrade qie"
        raise BackendMissingError(
            f"{engine.component} is built for {engine.backend}, which is not installed here; run `{install}`"
        )
    return SESSIONS[engine.backend](folder, engine, device, index, threads)


def load_parts(
    folder: Path,
    engines: Sequence[EngineRecord],
    device: Device | None = None,
    index: int | None = None,
    threads: int = 0,
    *,
    to_come: int = 0,
) -> Session:
    """Load the engine of a component, or those of all its parts; nothing stays loaded where one cannot be.

    Args:
        folder: see ``load``.
        engines: of one component and target, in order.
        device: see ``load``.
        index: see ``load``.
        threads: see ``load``.
        to_come: bytes of engines of other components that will be loaded beside these.

    Raises:
        BackendMissingError, EngineMismatchError, BundleError, EngineError: see ``load``.
    """
    sessions: list[Session] = []
    with ExitStack() as stack:
        for number, engine in enumerate(engines):
            if device is not None:
                following = {file.path: file.bytes for later in engines[number + 1 :] for file in later.files}
                device.weights_to_come = to_come + sum(following.values())
            sessions.append(load(folder, engine, device, index, threads))
            stack.callback(sessions[-1].close)
        stack.pop_all()
    return sessions[0] if len(sessions) == 1 else PartsSession(sessions, engines)


def _onnxruntime(folder: Path, engine: EngineRecord, device: Device | None, index: int | None, threads: int) -> Session:
    from qie.engines.sessions.onnxruntime import OnnxRuntimeSession

    if engine.compute_capability == "cpu":
        return OnnxRuntimeSession(folder, engine, threads=threads)
    gpu = choose_gpu(this_machine(), engine.compute_capability, index)
    return OnnxRuntimeSession(folder, engine, device=gpu.index)


def _tensorrt(folder: Path, engine: EngineRecord, device: Device | None, index: int | None, threads: int) -> Session:
    from qie.engines.sessions.tensorrt.session import TensorRtSession

    assert device is not None
    return TensorRtSession(folder, engine, device)


def _tensorrt_llm(
    folder: Path, engine: EngineRecord, device: Device | None, index: int | None, threads: int
) -> Session:
    from qie.engines.sessions.tensorrt_llm.session import TensorRtLlmSession

    assert device is not None
    return TensorRtLlmSession(folder, engine, device)


def _vllm(folder: Path, engine: EngineRecord, device: Device | None, index: int | None, threads: int) -> Session:
    from qie.engines.sessions.vllm.session import VllmSession

    if engine.compute_capability == "cpu":
        return VllmSession(folder, engine, threads=threads)
    gpu = choose_gpu(this_machine(), engine.compute_capability, index)
    return VllmSession(folder, engine, index=gpu.index)


SESSIONS: dict[str, Callable[[Path, EngineRecord, Device | None, int | None, int], Session]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt,
    "tensorrt": _tensorrt,
    "tensorrt-llm": _tensorrt_llm,
    "vllm": _vllm,
}
"""Backend to what makes its session, from the arguments of ``load``."""
