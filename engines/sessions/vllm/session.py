"""The language model and the vision tower in vLLM, in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qie.engines.bundle.manifest import EngineRecord
from qie.engines.errors import RequestError
from qie.engines.sessions.host_tensors import HostTensors
from qie.engines.sessions.vllm.engine import Engine, open_engine
from qie.engines.sessions.vllm.prompt import raster_patches, read_prompt, vision_grids

__all__ = ["VllmSession"]


class VllmSession(HostTensors):
    """One component of a text encoder."""

    def __init__(self, folder: Path, record: EngineRecord, index: int | None = None, threads: int = 0) -> None:
        """Load the text encoder of ``record`` in the bundle ``folder``, where no other session has it loaded.

        Args:
            folder: of the bundle.
            record: of the bundle.
            index: CUDA index of the GPU; None on a CPU.
            threads: on a CPU; 0 for PyTorch's default.

        Raises:
            BackendMissingError: vLLM does not load, or is for another device.
            BundleError: vLLM does not load the text encoder.
            EngineError: memory ran out.
        """
        super().__init__(record)
        place = (folder / record.path).parent
        self._engine: Engine | None = None
        self._give_back: Callable[[], None] | None = None
        self._engine, self._give_back = open_engine(place, record.precision, index, threads)

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Compute ``prompt_embeds`` float32 [1, L, D], the last L hidden states of a prompt, or ``image_embeds``
        float32 [V, D].

        Raises:
            RequestError: the prompt is longer than the bundle's limit.
            EngineError: vLLM failed or memory ran out.
        """
        self.check_tensors(inputs, outputs)
        engine = self._engine
        assert engine is not None, "the session is closed"
        if self._component == "vision":
            embeds_VD = engine.image_embeds(raster_patches(inputs), vision_grids(inputs))
            assert embeds_VD.shape == outputs["image_embeds"].shape, f"vLLM's embeddings are {embeds_VD.shape}"
            np.copyto(outputs["image_embeds"], embeds_VD)
            return
        target_1LD, settings = outputs["prompt_embeds"], engine.settings
        tokens = inputs["input_ids"].shape[1]
        assert len(target_1LD) == 1, f"{len(target_1LD)} prompts in a run, expected 1"
        if tokens > settings.positions:
            raise RequestError(
                f"the prompt has {tokens} tokens, the engine takes {settings.positions}; shorten the instruction or "
                "use fewer images, or build with a larger shapes.prompt_tokens.max in the recipe",
                option="instructions",
            )
        prompt = read_prompt(inputs, image_token_id=settings.image_token_id, merge_size=settings.merge_size)
        np.copyto(target_1LD[0], engine.hidden_states(prompt)[tokens - target_1LD.shape[1] :])

    def close(self) -> None:
        """Give the engine back; vLLM ends with the last session. Closing twice is allowed."""
        if self._give_back is not None:
            self._give_back()
        self._engine = self._give_back = None
