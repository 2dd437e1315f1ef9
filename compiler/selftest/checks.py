"""The checks of a self-test: each takes a case and returns what it found, or raises ``Failed``."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from qie.compiler.metrics.error import psnr_db, relative_l2
from qie.compiler.selftest.case import Case, request
from qie.compiler.selftest.recording import Run
from qie.compiler.selftest.report import Failed
from qie.engines.bfloat16 import narrow
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.editing.request import Edit
from qie.engines.sessions import cuda
from qie.engines.sessions.device import Device, DeviceTensor
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.tensorrt.session import TensorRtSession
from qie.engines.terminal import human_bytes

__all__ = ["CHECKS", "Checked"]

RELATIVE_L2 = 0.03
"""Largest relative L2 distance of an engine in bfloat16 from float32, on the tensors of an edit."""

PSNR_DB = 28.0
"""Smallest PSNR of an edit in bfloat16 against float32: the default gate of the recipes."""

LEFT_BYTES = 64 << 20
"""What the driver and TensorRT may keep for kernels and handles that were used once."""

ACTIVATIONS = 1.02
"""The memory that an engine asks for, as a multiple of what was recorded when it was built, at most."""

Checked = Callable[[Case], str]


@contextmanager
def _session(component: Component, case: Case, **options: Any) -> Iterator[tuple[TensorRtSession, Device]]:
    """One engine on a device of its own, both closed afterwards; ``options`` are those of ``open_device``."""
    record = case.record(component)
    device = open_device([record], device=case.device, **options)
    assert device is not None
    try:
        with case.timed("load"):
            session = load(case.on_gpu.path, record, device)
        assert isinstance(session, TensorRtSession)
        try:
            yield session, device
        finally:
            session.close()
            del session
    finally:
        gc.collect()
        device.close()


def _engine(component: Component, case: Case) -> str:
    """Load one engine: contract, weights and activations against the manifest; then run it against the CPU."""
    record = case.record(component)
    with _session(component, case) as (session, _):
        accepted = ", ".join(f"{name} {found}" for name, found in session.contract.items())
        distance = _largest([_distance(session, run) for run in case.expected[1] if run.component == component])
        found = (
            f"loaded in {case.seconds['load']:.2f} s, {human_bytes(sum(f.bytes for f in record.files))} of files, "
            f"activations {human_bytes(session.activation_bytes)}, recorded {_recorded(record.activation_bytes)}, "
            f"relative L2 {distance:.4f} (at most {RELATIVE_L2}); {accepted}"
        )
        if record.activation_bytes and session.activation_bytes > ACTIVATIONS * record.activation_bytes:
            raise Failed(f"more activations than recorded: {found}")
        if not distance <= RELATIVE_L2:
            raise Failed(f"too far from the CPU: {found}")
        return found


def _recorded(count: int | None) -> str:
    return "nothing" if count is None else human_bytes(count)


def _distance(session: TensorRtSession, run: Run) -> float:
    """The largest relative L2 distance of the outputs of ``run`` on the GPU from those on the CPU."""
    inputs, outputs = _uploaded(session, run)
    session.run(inputs, outputs)
    return _largest([relative_l2(np.asarray(session.download(outputs[name])), run.outputs[name]) for name in outputs])


def _largest(distances: Sequence[float]) -> float:
    """The largest of ``distances``; not a number where one is none, which ``max`` may pass over."""
    return float(np.max(distances))


def _uploaded(session: TensorRtSession, run: Run) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor]]:
    """The inputs of ``run`` on the GPU in the engine's dtypes, and empty outputs."""
    inputs = {
        name: session.upload(narrow(array) if session.contract[name].startswith("input bfloat16") else array)
        for name, array in run.inputs.items()
    }
    return inputs, {name: session.upload(np.zeros_like(array)) for name, array in run.outputs.items()}


def _edit(case: Case) -> str:
    expected, _ = case.expected
    with case.editor() as editor:
        with case.timed("first"):
            edit = editor.edit(request())
        with case.timed("second"):
            editor.edit(request())
    psnr = psnr_db(np.asarray(edit.images[0]), np.asarray(expected.images[0]))
    found = (
        f"PSNR against the CPU {psnr:.1f} dB (at least {PSNR_DB:g}), first edit {case.seconds['first']:.2f} s, second "
        f"{case.seconds['second']:.2f} s"
    )
    if psnr < PSNR_DB:
        raise Failed(found)
    return found


def _repeats(case: Case) -> str:
    with case.editor() as editor:
        first = editor.edit(request())
        for other in ({"size": (96, 64)}, {"guidance": 1.0}, {"seeds": [1, 2]}):
            editor.edit(request(**other))
        again = editor.edit(request())
    return _same(first, again, "the same bytes after edits of other sizes, guidance and batches")


def _interrupted(case: Case) -> str:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 2:
            raise KeyboardInterrupt

    with case.editor() as editor:
        first = editor.edit(request())
        try:
            editor.edit(request(), progress=interrupt)
        except KeyboardInterrupt:
            pass
        else:
            raise Failed("the interrupt did not arrive")
        again = editor.edit(request())
    return _same(first, again, "the same bytes after an interrupt in the loop")


def _sequential(case: Case) -> str:
    edits: dict[str, Edit] = {}
    for residency in ("resident", "sequential"):
        with case.editor(residency=residency) as editor:
            editor.edit(request())
            with case.timed(residency):
                edits[residency] = editor.edit(request())
    return _same(
        edits["resident"],
        edits["sequential"],
        f"the same bytes with engines one after another, {case.seconds['sequential']:.2f} s against "
        f"{case.seconds['resident']:.2f} s",
    )


def _cuda_graphs(case: Case) -> str:
    edits: dict[bool, Edit] = {}
    for graphs in (True, False):
        with case.editor(cuda_graphs=graphs) as editor:
            editor.edit(request())
            with case.timed(str(graphs)):
                edits[graphs] = editor.edit(request())
            if graphs:
                with editor.stages.session("transformer") as session:
                    assert isinstance(session, TensorRtSession)
                    _check_captured(session)
    return _same(
        edits[True],
        edits[False],
        f"the same bytes with CUDA graphs, {case.seconds['True']:.2f} s against {case.seconds['False']:.2f} s without",
    )


def _check_captured(session: TensorRtSession) -> None:
    """Check that runs were captured as CUDA graphs: without any, equal bytes would prove nothing."""
    if not session.captured:
        raise Failed("nothing was captured as a CUDA graph, see the warnings of TensorRT")


def _moved_arena(case: Case) -> str:
    """A CUDA graph that survived a move of the arena would write into memory that was freed."""
    run = next(run for run in case.expected[1] if run.component == "transformer")
    with _session("transformer", case, cuda_graphs=True) as (session, device):
        inputs, outputs = _uploaded(session, run)
        results = []
        for turn in range(6):
            if turn == 3:
                before = device.arena
                device.reserve(before.size + 1)
                moved = "moved" if device.arena.address != before.address else "grew at the same address"
            session.run(inputs, outputs)
            if turn == 2:
                _check_captured(session)
            results.append(np.array(session.download(outputs["velocity"])))
        inputs.clear()
        outputs.clear()
    if not all(np.array_equal(results[0], later) for later in results[1:]):
        raise Failed(f"other bytes with CUDA graphs once the arena {moved}")
    return f"the same bytes with CUDA graphs once the arena {moved}"


def _specialization(case: Case) -> str:
    """The first edit with each of three lengths of the prompt, without and with kernels compiled for them."""
    prompts = (
        "tint it purple",
        "turn the whole image upside down",
        "make it black and white and then blur it a little",
    )
    parts, edits = [], []
    for kind in ("none", "eager"):
        with case.editor(specialization=kind) as editor:
            editor.edit(request("invert the colours"))
            for prompt in prompts:
                with case.timed(prompt):
                    edit = editor.edit(request(prompt))
            edits.append(edit)
        parts.append(f"{kind} {', '.join(f'{case.seconds[prompt]:.2f}' for prompt in prompts)} s")
    psnr = psnr_db(np.asarray(edits[0].images[0]), np.asarray(edits[1].images[0]))
    found = f"{'; '.join(parts)}; PSNR between them {psnr:.1f} dB (at least {PSNR_DB:g})"
    if psnr < PSNR_DB:
        raise Failed(found)
    return found


def _memory(case: Case) -> str:
    used = []
    for _ in range(4):
        with case.editor() as editor:
            editor.edit(request())
            device = editor.stages.device
            assert device is not None
            arena = device.arena.size
        gc.collect()
        free, total = cuda.memory()
        used.append(total - free)
    found = f"arena {human_bytes(arena)}, in use after closing: {', '.join(human_bytes(count) for count in used)}"
    if used[-1] > used[0] + LEFT_BYTES:
        raise Failed(f"every editor leaves memory behind: {found}")
    return found


def _same(one: Edit, other: Edit, text: str) -> str:
    if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(one.images, other.images, strict=True)):
        psnr = psnr_db(np.asarray(one.images[0]), np.asarray(other.images[0]))
        raise Failed(f"not {text}: PSNR between them {psnr:.1f} dB")
    return text


CHECKS: Mapping[str, Checked] = {
    **{f"engine {component}": partial(_engine, component) for component in COMPONENTS},
    "edit": _edit,
    "repeated edit": _repeats,
    "interrupted edit": _interrupted,
    "engines one after another": _sequential,
    "CUDA graphs": _cuda_graphs,
    "moved arena": _moved_arena,
    "kernels for new shapes": _specialization,
    "memory": _memory,
}
"""Name of a check to its function, in the order in which they run."""
