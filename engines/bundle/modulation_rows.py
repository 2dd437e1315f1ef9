"""Layout of the modulation of one transformer block: stream, then half, then kind; a row is ``width`` values.

    noise        attention: shift, scale, gate    mlp: shift, scale, gate
    references   the same rows at timestep 0, only in models with ``zero_cond_t``
    text         the same rows

A stream's six rows are the output of one linear of the checkpoint, ``img_mod`` or ``txt_mod``, in the same order
(transformer_qwenimage.py, QwenImageTransformerBlock.forward).
"""

from typing import Literal

__all__ = ["CHANNELS", "EMBEDDER", "HALVES", "KINDS", "MODULES", "NORM_OUT", "ROWS", "Half", "Kind", "Stream",
           "block_slice", "has_references", "linears", "module_slice", "rows", "streams"]  # fmt: skip

Stream = Literal["noise", "references", "text"]
Half = Literal["attention", "mlp"]
Kind = Literal["shift", "scale", "gate"]

HALVES: tuple[Half, ...] = ("attention", "mlp")
KINDS: tuple[Kind, ...] = ("shift", "scale", "gate")

MODULES: dict[Stream, str] = {"noise": "img_mod", "references": "img_mod", "text": "txt_mod"}
"""The module of a block in the checkpoint that makes a stream's rows."""

ROWS = len(HALVES) * len(KINDS)
"""Rows of one stream."""


CHANNELS = 256
"""Sinusoidal channels of a timestep (transformer_qwenimage.py, QwenTimestepProjEmbeddings)."""


EMBEDDER = ("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2")
"""The linears through which a timestep goes before any other."""

NORM_OUT = "norm_out.linear"
"""The linear that makes scale and shift of the output norm, in this order."""


def linears(layers: int, width: int) -> dict[str, tuple[int, int]]:
    """Name and shape [out, in] of every linear that only the timestep reaches, in the order of the file."""
    shapes = {EMBEDDER[0]: (width, CHANNELS), EMBEDDER[1]: (width, width), NORM_OUT: (2 * width, width)}
    for layer in range(layers):
        for module in dict.fromkeys(MODULES.values()):
            shapes[f"transformer_blocks.{layer}.{module}.1"] = (ROWS * width, width)
    return shapes


def streams(*, references: bool) -> tuple[Stream, ...]:
    """The streams of a block in order; ``references`` says whether these have rows of their own (``zero_cond_t``)."""
    return ("noise", "references", "text") if references else ("noise", "text")


def rows(*, references: bool) -> int:
    """Rows of a block: 18 with rows for references, else 12."""
    return ROWS * len(streams(references=references))


def has_references(values: int, width: int) -> bool:
    """Whether a block of so many modulation values has rows for references."""
    return values == rows(references=True) * width


def module_slice(half: Half, kind: Kind, width: int) -> slice:
    """Where a row is among the 6 * ``width`` values of one stream."""
    row = HALVES.index(half) * len(KINDS) + KINDS.index(kind)
    return slice(row * width, (row + 1) * width)


def block_slice(stream: Stream, half: Half, kind: Kind, width: int, *, references: bool) -> slice:
    """Where a row is among all values of a block."""
    first = streams(references=references).index(stream) * ROWS * width
    row = module_slice(half, kind, width)
    return slice(first + row.start, first + row.stop)
