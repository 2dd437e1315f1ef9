"""The peak memory of the largest edit that a bundle takes, in a process of its own: ``measured_peak``.

The process is ``python -P -m qie.compiler.validation.measure BUNDLE [DEVICE]``. It imports the runtime alone, as a
program that edits does, and writes one line of JSON: ``bytes``, or ``failed``, or ``unknown`` with the reason. It ends
when its stdin does, which is a pipe that the process that started it holds open: a killed ``qie validate`` leaves none.
"""

import json
import os
import subprocess
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from qie.engines.bundle.specs import MAX_INSTRUCTION_TOKENS
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.errors import BackendMissingError, EngineError, QieError, RequestError
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PREFIX_TOKENS, encode
from qie.engines.inputs.sizes import calculate_dimensions, resolve_size
from qie.engines.inputs.vision import vision_inputs
from qie.engines.machine import choose_gpu, this_machine
from qie.engines.sessions import cuda

__all__ = ["largest_request", "main", "measured_peak"]

STEPS = 2
"""Denoising steps: the second takes what the first left."""

GUIDANCE = 2.0
"""With guidance, both prompts and both velocities are in memory."""

WORD = " red"


def measured_peak(bundle: Path, device: int | None = None) -> int:
    """Bytes of the GPU that the largest edit takes, on a CPU of the whole process, measured in a new process.

    Raises:
        EngineError: the edit failed, or memory ran out.
        BackendMissingError: what tells a GPU's memory is not installed.
    """
    words = [sys.executable, "-P", "-m", "qie.compiler.validation.measure", str(bundle)]
    words += [] if device is None else [str(device)]
    stdin, held = os.pipe()
    try:
        done = subprocess.run(words, stdin=stdin, capture_output=True, text=True, check=False, start_new_session=True)
    finally:
        os.close(stdin)
        os.close(held)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise EngineError(
            f"the process with the largest edit ended with code {done.returncode} ({last}); free memory, or lower "
            "shapes.batch.max or shapes.references.max in the recipe"
        )
    answer = json.loads(lines[-1])
    if "failed" in answer:
        raise EngineError(answer["failed"])
    if "unknown" in answer:
        raise BackendMissingError(answer["unknown"])
    return int(answer["bytes"])


def largest_request(editor: Editor) -> Request:
    """The edit for which ``qie plan`` counts memory: the largest area, batch and images, and the longest prompts."""
    manifest = editor.bundle.manifest
    limits, model = manifest.limits, manifest.model
    square = calculate_dimensions(limits.max_area, 1)
    size, _ = resolve_size(limits, square.width, square.height)
    largest = max(limits.buckets, key=lambda bucket: bucket.area)
    count = 1 if model.pipeline == "edit" else limits.references_max
    image = Image.effect_noise((largest.width, largest.height), 60).convert("RGB")
    grids = vision_inputs([prepare(image, model.areas).vision] * count, model.vision).grids

    def too_long(words: int) -> bool:
        try:
            prompt = encode(editor.tokenizer, [WORD * words], grids, model.prompt)
        except RequestError:
            return True
        return max(prompt.lengths) - PREFIX_TOKENS > limits.prompt_tokens_max

    words = bisect_left(range(2, MAX_INSTRUCTION_TOKENS + 2), True, key=too_long) + 1
    return Request(
        images=[image] * count,
        instructions=[WORD * words],
        negative=WORD * words,
        seeds=list(range(limits.batch_max)),
        steps=STEPS,
        guidance=GUIDANCE,
        size=(size.width, size.height),
    )


def _peak_of_process(editor: Editor) -> int:
    """Peak resident memory of this process after the largest edit, weights that are mapped from files among it."""
    editor.edit(largest_request(editor))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _peak_of_gpu(editor: Editor, device: int | None) -> int:
    """Most of the GPU's memory that was in use beyond what was before, seen at the begin and end of every run."""
    if find_spec("cuda") is None:
        raise BackendMissingError(
            "cuda-python is not installed, which tells what memory of the GPU is in use; run `pip install cuda-python`"
        )
    (capability, *_) = (engine.compute_capability for engine, *_ in editor.stages.engines.values())
    cuda.use(choose_gpu(this_machine(), capability, device).index)
    free, total = cuda.memory()
    before, peak = total - free, 0

    def look(*_: str | int) -> None:
        nonlocal peak
        free, total = cuda.memory()
        peak = max(peak, total - free - before)

    editor.edit(largest_request(editor), progress=look)
    look()
    return peak


def main(words: list[str], write: Callable[[str], object]) -> None:
    """Measure, and ``write`` the answer as a line of JSON.

    Args:
        words: folder of a bundle, and the CUDA index of the GPU where one was chosen.
        write: such as ``sys.stdout.write``.
    """
    try:
        device = int(words[1]) if len(words) > 1 else None
        with Editor(Path(words[0]), device=device, encoder_cache=EncoderCache(bytes_max=0)) as editor:
            on_cpu = all(engine.compute_capability == "cpu" for engine, *_ in editor.stages.engines.values())
            peak = _peak_of_process(editor) if on_cpu else _peak_of_gpu(editor, device)
        answer: dict[str, str | int] = {"bytes": peak}
    except BackendMissingError as problem:
        answer = {"unknown": str(problem)}
    except QieError as problem:
        answer = {"failed": str(problem)}
    write(json.dumps(answer) + "\n")


def _end_with_stdin() -> None:
    """End the process once the other end of its stdin is closed, whatever it is doing."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    main(sys.argv[1:], sys.stdout.write)
