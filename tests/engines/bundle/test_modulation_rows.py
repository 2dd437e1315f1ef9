"""The layout of a block's modulation, against the order in which diffusers chunks it."""

import itertools

import numpy as np
import pytest

from qie.engines.bundle.modulation_rows import (
    HALVES,
    KINDS,
    MODULES,
    block_slice,
    has_references,
    module_slice,
    rows,
    streams,
)

WIDTH = 3


@pytest.mark.parametrize("references", [True, False])
def test_rows_are_stream_then_half_then_kind(references: bool) -> None:
    names = ["noise", "references", "text"] if references else ["noise", "text"]
    assert list(streams(references=references)) == names
    values = np.arange(len(names) * 6 * WIDTH)
    order = itertools.product(streams(references=references), HALVES, KINDS)
    slices = [values[block_slice(*row, WIDTH, references=references)] for row in order]
    assert np.array_equal(np.concatenate(slices), values)
    assert len(slices) == rows(references=references) == (18 if references else 12)
    assert has_references(len(values), WIDTH) is references


def test_a_stream_has_the_six_chunks_of_its_linear() -> None:
    """transformer_qwenimage.py: mod1, mod2 = mod.chunk(2); shift, scale, gate = mod1.chunk(3)."""
    values = np.arange(6 * WIDTH)
    for half, part in zip(("attention", "mlp"), np.split(values, 2), strict=True):
        for kind, chunk in zip(("shift", "scale", "gate"), np.split(part, 3), strict=True):
            assert np.array_equal(values[module_slice(half, kind, WIDTH)], chunk)


def test_references_have_the_module_of_noise() -> None:
    assert MODULES == {"noise": "img_mod", "references": "img_mod", "text": "txt_mod"}
