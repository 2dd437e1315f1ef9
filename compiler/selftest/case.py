"""What the checks of one backend share: the pocket model's bundles for GPU and CPU, a request, recorded runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qie.compiler.packing.build import build
from qie.compiler.planning.resolve import plan_build
from qie.compiler.selftest.recording import RecordingStages, Run
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component, EngineRecord
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.editing.edit import edit
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Edit, Request
from qie.engines.progress import no_progress

__all__ = ["STEPS", "Case", "build_pocket", "recipe_text", "request"]

STEPS = 6

RECIPE = """\
schema = 2
gpu = "{gpu}"
compute_capability = "{capability}"
memory_gib = {memory:.2f}
backends = ["{backend}"]
noise = "float32"
modulation = "weights"

[limits]
build_workspace_gib = {workspace:.2f}
"""


def recipe_text(backend: str, *, gpu: str, capability: str, memory_gib: float) -> str:
    """A recipe in bfloat16 for one backend and the GPU at hand, whose memory is given in GiB."""
    name = "".join(c for c in gpu if " " <= c <= "~" and c not in '"\\')
    return RECIPE.format(
        gpu=name, capability=capability, memory=memory_gib, backend=backend, workspace=min(4.0, memory_gib / 2)
    )


def build_pocket(recipe: str | Path, destination: Path, *, device: int | None = None) -> Bundle:
    """Build the pocket model's bundle into the folder ``destination``, where that takes a GPU on ``device``.

    Raises:
        QieError: it cannot be built.
    """
    return build(plan_build("pocket", gpu=recipe, out=destination, device=device))


@dataclass(kw_only=True)
class Case:
    """What the checks of one backend work on.

    Attributes:
        backend: that executes.
        on_gpu: the bundle for the GPU.
        on_cpu: the bundle for the CPU, in float32.
        device: CUDA index of the GPU; None for the first that fits.
        seconds: of what a check timed, by name, for its report.
    """

    backend: str
    on_gpu: Bundle
    on_cpu: Bundle
    device: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def expected(self) -> tuple[Edit, list[Run]]:
        """The edit on the CPU, and every run of its engines."""
        runs: list[Run] = []
        stages = RecordingStages(self.on_cpu, runs)
        try:
            return edit(stages, open_tokenizer(self.on_cpu), request(), progress=no_progress), runs
        finally:
            stages.close()

    @contextmanager
    def editor(self, **options: Any) -> Iterator[Editor]:
        """An editor on the GPU, closed afterwards; every edit runs every engine."""
        with Editor(self.on_gpu, device=self.device, encoder_cache=EncoderCache(bytes_max=0), **options) as editor:
            yield editor

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block, in seconds."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def record(self, component: Component) -> EngineRecord:
        """The engine of ``component`` for the GPU, which the small model has in one part."""
        return next(e for e in self.on_gpu.manifest.engines if e.component == component)


def request(instruction: str = "tint it purple", **changes: Any) -> Request:
    """An edit of a made-up image with guidance, so that both passes run."""
    base: dict[str, Any] = {"seeds": [3], "steps": STEPS, "guidance": 4.0}
    return Request(images=[_image()], instructions=[instruction], **(base | changes))


def _image() -> Image.Image:
    """Smooth waves of colour, 160 x 112 pixels."""
    y, x = np.mgrid[0:112, 0:160].astype(np.float32)
    channels = [127.5 + 100 * np.sin(x / 23 + c) * np.cos(y / 17 - c) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))
