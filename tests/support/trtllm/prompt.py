"""A recorded run of the language model, executed by the reader: what an engine of the checkpoint should give."""

from pathlib import Path

import numpy as np

from tests.support.trtllm.checkpoint import open_decoder
from tests.support.trtllm.config import Config
from tests.support.trtllm.stored import Array, Floats


def hidden_states(folder: Path, inputs: dict[str, Array]) -> Floats:
    """The hidden states [S, D] of the checkpoint in ``folder``.

    Args:
        folder: the checkpoint.
        inputs: ``input_ids`` [1, S], ``image_index`` [1, S] (row of ``image_embeds``, or -1), ``image_embeds`` [V, D]
            and ``position_ids`` [3, 1, S] of qie's language model.
    """
    decoder = open_decoder(folder)
    index_S = inputs["image_index"][0]
    ids_S = np.where(index_S >= 0, decoder.config.vocabulary + index_S, inputs["input_ids"][0])
    embedded = decoder.embed(ids_S, inputs["image_embeds"].astype(np.float32))
    return decoder(embedded, rotary_table(inputs["position_ids"][:, 0], decoder.config))


def rotary_table(positions_3S: Array, config: Config) -> Floats:
    """[S, half, 2] (cos, sin); a section of the frequencies turns with the frame, the height and the width.

    Source: transformers' Qwen2_5_VLRotaryEmbedding and ``apply_multimodal_rotary_pos_emb``.
    """
    size, theta = config.rotary_dim, config.content["rotary_base"]
    frequency = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
    axis = np.repeat(np.arange(3), config.content["rotary_scaling"]["mrope_section"])
    angles = positions_3S[axis].T * frequency
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
