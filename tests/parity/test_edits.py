"""Whole edits against the diffusers pipelines for equal noise: at least 55 dB PSNR, step by step the same latents."""

import numpy as np
import pytest

from qie.compiler.metrics.error import relative_l2
from qie.engines.editing.denoise import StepState
from qie.engines.editing.request import Request
from tests.support.images import smooth_image
from tests.support.parity import CASES, MANY, SideOf, images, psnr

BOUND_DB = 55.0
INSTRUCTION = "paint the wall blue"


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize(("name", "count"), MANY)
def test_edit(side_of: SideOf, name: str, count: int, guidance: float) -> None:
    side = side_of(name)
    states: list[StepState] = []
    request = Request(images=images(count), instructions=[INSTRUCTION], seeds=[11], steps=5, guidance=guidance)
    edit = side.editor.edit(request, observer=states.append)

    steps = []
    expected = side.reference.edit(images(count), INSTRUCTION, cfg=guidance, steps=5, seed=11, on_step=steps.append)
    assert expected.std() > 5  # a flat image would prove nothing
    assert psnr(edit.images[0], expected) >= BOUND_DB
    assert [s.sigma for s in states] == [s.sigma for s in steps]
    for ours, theirs in zip(states, steps, strict=True):
        assert relative_l2(ours.latents[0], theirs.latents) < 1e-4
        assert (ours.negative_velocity is None) == (guidance <= 1)


@pytest.mark.parametrize("size", [(96, 160), (176, 64), (112, 80)])
@pytest.mark.parametrize("name", ["edit", "2509", "2511"])
def test_edit_of_another_size(side_of: SideOf, name: str, size: tuple[int, int]) -> None:
    """The result has its own size and aspect, the references keep theirs."""
    side = side_of(name)
    request = Request(images=images(1), instructions=[INSTRUCTION], seeds=[5], steps=3, size=size)
    edit = side.editor.edit(request)
    assert edit.images[0].size == size
    expected = side.reference.edit(images(1), INSTRUCTION, steps=3, seed=5, width=size[0], height=size[1])
    assert psnr(edit.images[0], expected) >= BOUND_DB


@pytest.mark.parametrize("shape", [(230, 100), (64, 64), (39, 90), (500, 499)])
def test_edit_of_an_odd_aspect(side_of: SideOf, shape: tuple[int, int]) -> None:
    side = side_of("2511")
    image = smooth_image(*shape, seed=9, grain=12)
    edit = side.editor.edit(Request(images=[image], instructions=[INSTRUCTION], seeds=[1], steps=3))
    expected = side.reference.edit([image], INSTRUCTION, steps=3, seed=1)
    assert psnr(edit.images[0], expected) >= BOUND_DB


def test_negative_prompt(side_of: SideOf) -> None:
    side = side_of("2511")
    request = Request(images=images(2), instructions=[INSTRUCTION], seeds=[2], steps=3, negative="blurry, dark")
    edit = side.editor.edit(request)
    expected = side.reference.edit(images(2), INSTRUCTION, negative="blurry, dark", cfg=4.0, steps=3, seed=2)
    assert psnr(edit.images[0], expected) >= BOUND_DB
    default = side.editor.edit(Request(images=images(2), instructions=[INSTRUCTION], seeds=[2], steps=3))
    assert not np.array_equal(default.images[0], edit.images[0])


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_steps(side_of: SideOf, steps: int) -> None:
    side = side_of("2509")
    request = Request(images=images(1), instructions=[INSTRUCTION], seeds=[4], steps=steps)
    if steps == 1:  # diffusers divides by zero there: 1 - sigma is 0 at the only step
        assert np.isfinite(side.editor.edit(request).images[0]).all()
        return
    expected = side.reference.edit(images(1), INSTRUCTION, steps=steps, seed=4)
    assert psnr(side.editor.edit(request).images[0], expected) >= BOUND_DB


def test_cases_differ() -> None:
    """The list covers what it says: three generations, several widths, head counts and axes."""
    for key in ("pipeline", "zero_cond_t", "num_attention_heads", "attention_head_dim", "axes_dims_rope", "text_names"):
        assert len({getattr(case, key) for case in CASES.values()}) > 1, key
