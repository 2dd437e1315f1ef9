"""The inputs and outputs of an engine of one prompt without a KV cache: what the builder creates for qie's command.

Sources: models/generation_mixin.py (``prepare_basic_inputs``, ``prepare_attention_inputs``: names, dtypes, shapes,
ranges), builder.py (mrope inputs by ``architecture``), models/modeling_utils.py (``prepare_inputs``: the prompt table
where ``max_prompt_embedding_table_size`` > 0, ``last_token_ids`` where context logits are not gathered), plugin.py
(``CustomAllReduceHelper``). The plugin for attention reads the ``host_*`` inputs on the host while it enqueues
(cpp/tensorrt_llm/plugins/gptAttentionPlugin). TensorRT knows nothing of that: no input is declared with a location, so
``get_tensor_location`` says DEVICE.

``Tensor(name=...)`` adds a network input when it is constructed, so inputs that nothing reads are of the engine, too.
"""

from dataclasses import asdict, dataclass
from typing import Any

from tests.support.trtllm.config import Config

Shape = tuple[int, ...]

HOST = frozenset(
    (
        "host_request_types",
        "host_context_lengths",
        "host_runtime_perf_knobs",
        "host_context_progress",
        "host_max_attention_window_sizes",
        "host_sink_token_length",
        "all_reduce_workspace",
    )
)
"""Inputs whose address is one of the host's memory."""

UNREAD = frozenset(("position_ids", "mrope_position_deltas"))
"""Inputs that the run of a prompt does not read: rotary positions are the table's rows, deltas are for generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """An input or output: -1 in ``dims`` is free, and ``low`` to ``high`` is its profile."""

    name: str
    dtype: str
    dims: Shape
    low: Shape
    opt: Shape
    high: Shape

    @property
    def host(self) -> bool:
        return self.name in HOST

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)


def parse_tensor(record: dict[str, Any]) -> Tensor:
    return Tensor(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})


def inputs_of(config: Config, build: dict[str, Any]) -> tuple[Tensor, ...]:
    """The inputs for a checkpoint's config and a ``build_config`` of the engine's config.json."""
    tokens = (1, build["opt_num_tokens"], build["max_num_tokens"])
    most = build["max_batch_size"] * build["max_beam_width"]
    batch = (1, (most + 1) // 2, most)
    table = build["max_prompt_embedding_table_size"]
    found: list[Tensor] = []

    def add(name: str, dtype: str, *dims: int | tuple[int, int, int]) -> None:
        ranges = [(dim, dim, dim) if isinstance(dim, int) else dim for dim in dims]
        low, opt, high = zip(*ranges, strict=True)
        free = tuple(dim if isinstance(dim, int) else -1 for dim in dims)
        found.append(Tensor(name=name, dtype=dtype, dims=free, low=low, opt=opt, high=high))

    add("input_ids", "int32", tokens)
    add("position_ids", "int32", tokens)
    if not build["gather_context_logits"]:
        add("last_token_ids", "int32", batch)
    if table > 0:
        add("prompt_embedding_table", config.dtype, (1, table // 2, table), config.width)
        add("tasks", "int32", tokens)
        add("prompt_vocab_size", "int32", 1)
    if config.mrope:
        add("mrope_rotary_cos_sin", "float32", batch, config.mrope_size)
        add("mrope_position_deltas", "int32", batch, 1)
    add("host_request_types", "int32", batch)
    add("context_lengths", "int32", batch)
    add("host_runtime_perf_knobs", "int64", 16)
    add("host_context_progress", "int64", 1)
    add("host_context_lengths", "int32", batch)
    add("host_max_attention_window_sizes", "int32", config.layers)
    add("host_sink_token_length", "int32", 1)
    if config.tp > 1:
        add("all_reduce_workspace", "int64", 7 * config.tp + 3)
    return tuple(found)


def output_of(name: str, dtype: str, config: Config, build: dict[str, Any]) -> Tensor:
    """The hidden states of all tokens."""
    low, opt, high = ((n, config.width) for n in (1, build["opt_num_tokens"], build["max_num_tokens"]))
    return Tensor(name=name, dtype=dtype, dims=(-1, config.width), low=low, opt=opt, high=high)
