"""Tensors of a checkpoint that no graph reads: those that qie leaves out on purpose, and those that are a mistake."""

import re
from collections.abc import Collection, Mapping

from qie.compiler.checkpoint.model import Model
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.subfolders import Subfolder
from qie.engines.errors import CheckpointError

__all__ = ["check_unread"]

_SHOWN = 5

_LAST_BLOCK = r"(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp\.net\.(0\.proj|2))\.(weight|bias)"
"""What only the text after the last block would need (docs/graphs.md)."""

_LEFT_OUT: dict[Subfolder, str] = {
    "transformer": rf"transformer_blocks\.LAST\.{_LAST_BLOCK}",
    "text_encoder": r"lm_head\.weight|.*\.rotary_emb\.inv_freq",
    "vae": r".*\.time_conv\.(weight|bias)",
}
"""Tensors of the published checkpoints without effect on an edit: of a head, and of frames after the first."""


def check_unread(
    readers: Mapping[Subfolder, TensorReader], read: Mapping[Subfolder, Collection[str]], model: Model
) -> None:
    """Refuse tensors that nothing reads, but for those that every checkpoint of this architecture has.

    Args:
        readers: the tensors of every subfolder.
        read: names of the tensors that graphs and modulation read.
        model: of the checkpoint.

    Raises:
        CheckpointError: there are such tensors: of more blocks than the config says, of another model, or of a format
            that qie does not know.
    """
    for subfolder, reader in readers.items():
        pattern = re.compile(_LEFT_OUT[subfolder].replace("LAST", str(model.transformer.layers - 1)))
        unread = sorted(name for name in reader.names() if name not in read[subfolder] and not pattern.fullmatch(name))
        if unread:
            more = f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
            raise CheckpointError(
                f"nothing reads {', '.join(map(repr, unread[:_SHOWN]))}{more} of {subfolder}, so a part of the model "
                "would be lost; take config and weights from one checkpoint, or allow it",
                option="allow_unread",
            )
