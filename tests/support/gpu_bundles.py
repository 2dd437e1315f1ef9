"""What the tests on a GPU share: bundles for the GPU of this machine, requests, and progress that stops an edit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.engines.backends import BACKENDS, serves_gpu
from qie.engines.bundle.bundle import Bundle
from qie.engines.editing.request import Request
from qie.engines.machine import this_machine
from qie.engines.progress import Progress
from qie.engines.sessions.choose import choose_engines
from tests.support.bundles import build
from tests.support.images import smooth_image

STEPS = 6

PROLOGUE = ""
"""What a process of a test runs first: on the fake GPU, what installs it."""

WIDE = replace(
    ARCHITECTURES["tiny"],
    num_attention_heads=24,
    attention_head_dim=128,
    axes_dims_rope=(16, 56, 56),
    text_hidden_size=2048,
    text_layers=6,
    text_heads=16,
    text_kv_heads=2,
    text_intermediate_size=8192,
    text_mrope_section=(16, 24, 24),
)
"""Two transformer layers of the published width and a language model of a similar size: about 1.5 GB in bfloat16."""

HEADS = replace(
    ARCHITECTURES["tiny"],
    text_hidden_size=512,
    text_layers=3,
    text_heads=4,
    text_kv_heads=2,
    text_intermediate_size=1024,
    text_mrope_section=(16, 24, 24),
)
"""Heads of 128 channels, for which attention has kernels; widths are whole groups of 128 inputs (W4A16_AWQ)."""

RECIPE = """\
schema = 2
gpu = "the GPU at hand"
compute_capability = "{capability}"
memory_gib = {memory}
backends = ["{backend}"]
noise = "float32"
modulation = "weights"
residency = "{residency}"

[shapes]
min_side = 32

[limits]
build_workspace_gib = {workspace}
"""


def build_for_gpu(checkpoint: Path, destination: Path, backend: str, residency: str = "resident") -> Bundle:
    """Build the bundle of ``checkpoint`` for GPU 0 and ``backend``, and check that it can run here.

    Builders and sessions take the first GPU that fits, which is GPU 0, and CUDA begins with it in every thread. The
    test is skipped where this machine cannot build for the backend, with the reason; any other problem fails it.
    """
    recipe = recipe_for(backend, residency)
    if reason := unavailable(backend, recipe):
        pytest.skip(reason)
    bundle = build(checkpoint, destination, recipe)
    choose_engines(bundle)
    return bundle


def recipe_for(backend: str, residency: str) -> str:
    """The recipe for GPU 0, as TOML."""
    machine = this_machine()
    gpu = machine.gpus[0]
    memory = gpu.memory_gib or machine.memory_gib
    return RECIPE.format(
        capability=gpu.compute_capability,
        memory=memory,
        backend=backend,
        residency=residency,
        workspace=min(4.0, memory / 2),
    )


def unavailable(backend: str, recipe: str) -> str | None:
    """Why this machine cannot build for ``backend``, or has the package for a CPU; None where it can."""
    facts = BACKENDS[backend]
    if facts.gpu_package is not None and not serves_gpu():
        return f"the {backend} that is installed here uses only the CPU; run `{facts.gpu_install}`"
    return BUILDERS[backend].unavailable(parse_recipe(recipe, Path("mine.toml")))


def edit_request(**changes: Any) -> Request:
    base: dict[str, Any] = {
        "images": [smooth_image(150, 90)],
        "instructions": ["make it red"],
        "seeds": [3],
        "steps": STEPS,
        "guidance": 4.0,
    }
    return Request(**(base | changes))


def stop(action: Callable[[], object]) -> Progress:
    """Progress that calls ``action`` in the middle of the denoising loop."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 2:
            action()

    return progress


def fail() -> None:
    raise RuntimeError("of the caller")
