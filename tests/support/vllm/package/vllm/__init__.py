"""A stand-in of vLLM 0.32: its class ``LLM`` as far as qie calls it, refusing what the real one refuses.

``tests/vllm/test_signatures.py`` compares it with the real one.
"""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from safetensors import safe_open

from tests.support.vllm.reference import opened

__all__ = ["ENCODE", "KNOWN", "LLM"]

KNOWN = (
    "runner", "convert", "pooler_config", "dtype", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
    "kv_cache_memory_bytes", "gpu_memory_utilization", "limit_mm_per_prompt", "enable_mm_embeds",
    "mm_processor_cache_gb", "skip_mm_profiling", "mm_device_do_normalize", "enable_prefix_caching",
    "enable_chunked_prefill", "enforce_eager", "use_tqdm_on_load",
)  # fmt: skip
"""Keyword arguments of the real ``LLM``."""

ENCODE = ("prompts", "pooling_task", "use_tqdm")
"""Arguments of its method ``encode``."""

BLOCK = 128
"""Tokens of a block of the key-value cache on a CPU."""


class LLM:
    """The real one's class, whose numbers a bundle computes.

    Attributes:
        reference: the bundle.
        opened: every one that was made.
        fails: an exception that the next call raises; None for none.
    """

    reference: ClassVar[Path]
    opened: ClassVar[list["LLM"]] = []
    fails: ClassVar[Exception | None] = None

    def __init__(self, model: str, **arguments: Any) -> None:
        unknown = arguments.keys() - set(KNOWN)
        if unknown:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument '{min(unknown)}'")
        _raise(LLM.fails)
        self.arguments, self.closed = arguments, False
        self._check_environment()
        folder = Path(model)
        config = json.loads((folder / "config.json").read_text())
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            json.loads((folder / name).read_text())
        self._check_weights(folder, config)
        text, longest = config["text_config"], arguments["max_model_len"]
        size = {"float32": 4, "bfloat16": 2}[arguments["dtype"]]
        token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * size
        token *= text["hidden_size"] // text["num_attention_heads"]
        if arguments["kv_cache_memory_bytes"] < token * BLOCK * math.ceil(longest / BLOCK):
            raise ValueError(f"To serve at least one request with the models's max seq len ({longest}), more KV cache")
        self._computes = opened(LLM.reference)
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(dtype=getattr(torch, arguments["dtype"])),
            engine_core=SimpleNamespace(shutdown=self._shut_down),
        )
        LLM.opened.append(self)

    def encode(
        self, prompts: list[dict[str, Any]], *, use_tqdm: bool = True, pooling_task: str | None = None
    ) -> list[Any]:
        """Hidden states of every token of every prompt."""
        assert not self.closed
        _raise(LLM.fails)
        if self.arguments["runner"] != "pooling" or pooling_task != self.arguments["pooler_config"]["task"]:
            raise ValueError(f"Unsupported task: {pooling_task!r}")
        return [self._encode(prompt["prompt_token_ids"], prompt["multi_modal_data"]["image"]) for prompt in prompts]

    def apply_model(self, func: Any) -> list[Any]:
        """What ``func`` makes of the model, for each of its workers."""
        assert not self.closed
        _raise(LLM.fails)
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise TypeError("Object of type <class 'function'> is not serializable")
        return [func(SimpleNamespace(visual=_Tower(self)))]

    def visual(self, patches: torch.Tensor, grid_thw: list[list[int]]) -> torch.Tensor:
        """The vision tower: patches that are normalized by the caller, since the argument says so."""
        if not self.arguments["limit_mm_per_prompt"]["image"]:
            raise NotImplementedError("StageMissingLayer should not be called")
        if self.arguments["mm_device_do_normalize"]:
            patches = patches / 255
        return torch.from_numpy(self._computes.image_embeds(patches.numpy(), grid_thw).copy())

    def _encode(self, token_ids: list[int], image: dict[str, torch.Tensor]) -> Any:
        if not self.arguments["enable_mm_embeds"]:
            raise ValueError("You must set `--enable-mm-embeds` to input `image_embeds`")
        embeds, grids = image["image_embeds"], image["image_grid_thw"]
        if grids.ndim != 2 or grids.shape[1] != 3 or grids.dtype != torch.int64:
            raise ValueError("image_grid_thw has rank 1, expected 2")
        if int(grids.prod(1).sum()) != 4 * len(embeds):
            raise ValueError(f"split_with_sizes expects split_sizes to sum exactly to {len(embeds)}")
        expanded = self._computes.expand(token_ids, grids.tolist())
        longest = self.arguments["max_model_len"]
        if len(expanded) > longest:
            raise ValueError(
                f"The decoder prompt (length {len(expanded)}) is longer than the maximum model length of {longest}"
            )
        hidden = torch.from_numpy(
            self._computes.hidden_states(token_ids, embeds.float().numpy(), grids.tolist()).copy()
        )
        if self.arguments["pooler_config"].get("use_activation", True):
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
        if self.arguments["enable_prefix_caching"]:
            hidden = hidden[16:]
        return SimpleNamespace(prompt_token_ids=expanded, outputs=SimpleNamespace(data=hidden))

    def _check_weights(self, folder: Path, config: dict[str, Any]) -> None:
        """Compare the names of the tensors with the layers of the config."""
        text, vision, needed = config["text_config"], config["vision_config"], set()
        for layer in range(text["num_hidden_layers"]):
            needed |= {f"model.language_model.layers.{layer}.{name}.weight" for name in _LAYER}
            needed |= {f"model.language_model.layers.{layer}.self_attn.{name}_proj.bias" for name in "qkv"}
        needed |= {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"}
        if self.arguments["limit_mm_per_prompt"]["image"]:
            blocks = range(vision["depth"])
            needed |= {f"model.visual.blocks.{block}.{name}.weight" for block in blocks for name in _BLOCK}
            needed |= {f"model.visual.{name}.weight" for name in ("patch_embed.proj", "merger.ln_q", "merger.mlp.2")}
        with safe_open(folder / "model.safetensors", "pt") as file:
            missing = needed - set(file.keys())
            shape = file.get_slice("model.language_model.embed_tokens.weight").get_shape()
        if missing or shape != [text["vocab_size"], text["hidden_size"]]:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")
        if not config["tie_word_embeddings"]:
            raise ValueError("Following weights were not initialized from checkpoint: {'lm_head.weight'}")

    def _check_environment(self) -> None:
        assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["VLLM_NO_USAGE_STATS"] == "1"

    def _shut_down(self) -> None:
        self.closed = True


class _Tower:
    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])

    def __call__(self, patches: torch.Tensor, grid_thw: list[list[int]]) -> torch.Tensor:
        return self._llm.visual(patches, grid_thw)


_LAYER = (
    "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem
