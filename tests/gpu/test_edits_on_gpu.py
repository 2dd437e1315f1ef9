"""Whole edits on the GPU: close to the CPU's, the same every time, with and without CUDA graphs, one by one."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qie.compiler.metrics.error import psnr_db, relative_l2
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.editing.denoise import StepState
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Edit
from tests.support.editors import uncached_editor
from tests.support.gpu_bundles import build_for_gpu, edit_request
from tests.support.images import smooth_image

BOUND_DB = 28.0
"""PSNR of an edit in bfloat16 against float32: the recipes' default gate."""

REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "not guided": {"guidance": 1.0},
    "two images": {"images": [smooth_image(150, 90), smooth_image(60, 80, 1)]},
    "another size": {"size": (96, 48)},
    "batches": {"instructions": ["make it red", "add snow and a dog"], "seeds": [1, 2, 3]},
}


@pytest.fixture
def editor(on_gpu: Bundle) -> Iterator[Editor]:
    editor = uncached_editor(on_gpu)
    yield editor
    editor.close()


def same(one: Edit, other: Edit) -> bool:
    return len(one.images) == len(other.images) and all(map(np.array_equal, one.images, other.images))


@pytest.mark.parametrize("name", REQUESTS)
def test_an_edit_is_close_to_the_cpus(
    editor: Editor, cpu_editor: Editor, name: str, measured: Callable[[str], None]
) -> None:
    edit = editor.edit(edit_request(**REQUESTS[name]))
    expected = cpu_editor.edit(edit_request(**REQUESTS[name]))
    pairs = [(np.asarray(ours), np.asarray(theirs)) for ours, theirs in zip(edit.images, expected.images, strict=True)]
    measured(", ".join(f"{psnr_db(*pair):.1f} dB (standard deviation {np.std(pair[1]):.1f})" for pair in pairs))
    assert all(np.std(theirs) > 5 for _, theirs in pairs)  # a flat image would prove nothing
    assert all(psnr_db(*pair) >= BOUND_DB for pair in pairs)


def test_the_first_velocity_is_close_to_the_cpus(
    editor: Editor, cpu_editor: Editor, measured: Callable[[str], None]
) -> None:
    """Before errors add up over the steps."""
    ours: list[StepState] = []
    theirs: list[StepState] = []
    editor.edit(edit_request(steps=1), observer=ours.append)
    cpu_editor.edit(edit_request(steps=1), observer=theirs.append)
    assert np.array_equal(ours[0].latents, theirs[0].latents)
    distance = relative_l2(ours[0].velocity, theirs[0].velocity)
    measured(f"{distance:.4f}")
    assert distance < 0.05


def test_an_edit_is_the_same_every_time(editor: Editor) -> None:
    request = edit_request(**REQUESTS["batches"])
    first = editor.edit(request)
    for name in REQUESTS:
        editor.edit(edit_request(**REQUESTS[name]))
    assert same(first, editor.edit(request))


@pytest.mark.parametrize("name", REQUESTS)
def test_cuda_graphs_change_no_byte(on_tensorrt: Bundle, name: str) -> None:
    edits = []
    for graphs in (True, False):
        editor = uncached_editor(on_tensorrt, cuda_graphs=graphs)
        edits.append(editor.edit(edit_request(**REQUESTS[name])))
        editor.close()
    assert same(*edits)


def test_engines_one_after_another_change_no_byte(
    on_tensorrt: Bundle, checkpoint: Any, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    backend = on_tensorrt.manifest.engines[0].backend
    sequential = build_for_gpu(checkpoint, tmp_path / "sequential", backend, residency="sequential")
    edits = []
    for bundle in (on_tensorrt, sequential):
        editor = uncached_editor(bundle)
        edits.append(editor.edit(edit_request()))
        assert editor.stages.loaded == (() if bundle is sequential else COMPONENTS)
        editor.close()
    assert same(*edits)
