"""What a stand-in of vLLM computes: the text encoder of a bundle for the CPU, by vLLM's inputs.

Shape suffixes: S prompt tokens, V image tokens, P patches, X values of a patch, M merged cells, D width.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.stages import Stages
from qie.engines.inputs.prompt import PREFIX_TOKENS, PromptTokens
from qie.engines.inputs.vision import VisionInputs, vision_inputs

__all__ = ["Reference", "opened"]

Array = NDArray[np.float32]
Grids = Sequence[Sequence[int]]


@functools.cache
def opened(bundle: Path) -> "Reference":
    """The reference of a bundle, whose engines stay loaded."""
    return Reference(bundle)


class Reference:
    """The text encoder of a bundle."""

    def __init__(self, bundle: Path) -> None:
        self.stages = Stages(open_bundle(bundle))
        self.model = self.stages.bundle.manifest.model
        self.image_token_id = self.model.prompt.image_token_id

    def expand(self, token_ids: Sequence[int], grids: Grids) -> list[int]:
        """The prompt with every image's first token repeated, as vLLM does whatever follows it."""
        unit = self.model.prompt.merge_size**2
        counts = [t * h * w // unit for t, h, w in grids]
        expanded: list[int] = []
        for token in token_ids:
            expanded += [token] * (counts.pop(0) if token == self.image_token_id and counts else 1)
        if counts:
            raise ValueError(f"Failed to apply prompt replacement for mm_items['image'][{len(grids) - len(counts)}]")
        return expanded

    def hidden_states(self, token_ids: Sequence[int], embeds_VD: Array, grids: Grids) -> Array:
        """The hidden states [S, D] of a prompt with one token an image; those of the prefix repeat the first other."""
        ids_S = np.array(self.expand(token_ids, grids), np.int64)
        is_image_S = ids_S == self.image_token_id
        if is_image_S.sum() != len(embeds_VD):  # a prompt that was expanded already: vLLM computes something
            return np.ones((len(ids_S), embeds_VD.shape[1]), np.float32)
        index_S = np.full(len(ids_S), -1, np.int64)
        index_S[is_image_S] = np.arange(len(embeds_VD))
        tokens = PromptTokens(
            input_ids=ids_S[None],
            image_index=index_S[None],
            position_ids=self._positions(ids_S, grids)[:, None],
            lengths=(len(ids_S),),
        )
        (text_1LD,) = self.stages.language([tokens], embeds_VD)
        return np.concatenate([np.repeat(text_1LD[0, :1], PREFIX_TOKENS, 0), text_1LD[0]])

    def image_embeds(self, patches_PX: Array, grids: Grids) -> Array:
        """The embeddings [V, D] of images whose patches are in the order of the image processor."""
        side, merge = self.model.vision.patch_size, self.model.vision.merge_size
        blank = vision_inputs([Image.new("RGB", (w * side, h * side)) for _, h, w in grids], self.model.vision)
        if [list(grid) for grid in blank.grids] != [list(grid) for grid in grids]:
            raise ValueError(f"no image has the grids {grids}")
        if len(blank.patches) != len(patches_PX):
            raise RuntimeError(f"shape mismatch: {len(patches_PX)} patches, the grids have {len(blank.patches)}")
        cells = patches_PX.reshape(-1, merge**2, patches_PX.shape[1])
        ordered = np.empty_like(cells)
        ordered[blank.raster_index] = cells
        fields: dict[str, Any] = {name: getattr(blank, name) for name in blank.__dataclass_fields__}
        return self.stages.vision(VisionInputs(**fields | {"patches": ordered.reshape(patches_PX.shape)}))

    def _positions(self, ids_S: NDArray[np.int64], grids: Grids) -> NDArray[np.int64]:
        """Frame, height and width positions [3, S] (transformers modeling_qwen2_5_vl.py, ``get_rope_index``)."""
        merge = self.model.prompt.merge_size
        remaining, positions, at, step = list(grids), [], 0, 0
        while at < len(ids_S):
            if ids_S[at] != self.image_token_id:
                positions.append((step, step, step))
                at, step = at + 1, step + 1
                continue
            _, height, width = remaining.pop(0)
            rows, columns = height // merge, width // merge
            positions += [(step, step + row, step + column) for row in range(rows) for column in range(columns)]
            at, step = at + rows * columns, step + max(rows, columns)
        return np.array(positions, np.int64).T
