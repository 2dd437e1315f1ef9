"""The decoder of Qwen2-VL without its language head, for ``trtllm-build --model_cls_file`` of TensorRT-LLM 1.2.1.

Qwen2.5-VL has the same decoder. The engine takes one or several prompts without padding and returns the hidden state
of every token behind the last norm. There is no key-value cache: build with ``--kv_cache_type disabled``.
"""

from typing import Any

from tensorrt_llm.layers import Attention
from tensorrt_llm.models import QWenForCausalLM
from tensorrt_llm.models.modeling_utils import DecoderModelForCausalLM
from tensorrt_llm.models.qwen.model import QWenModel

__all__ = ["TextEncoder"]


class TextEncoder(QWenForCausalLM):
    """Tokens and rows of the prompt table in; ``hidden_states``, float32 [tokens, width], out.

    The checkpoint needs no ``lm_head.weight``, because no module of that name exists.
    """

    def __init__(self, config: Any) -> None:
        # Not QWenForCausalLM.__init__: it creates the head, and a module that was registered stays among the named
        # parameters even after its attribute is set to None.
        DecoderModelForCausalLM.__init__(self, config, QWenModel(config), None)
        self.quant_mode = config.quant_mode
        self.mapping = config.mapping
        self.trtllm_modules_to_hf_modules = None

    def forward(
        self,
        input_ids: Any,
        position_ids: Any = None,
        use_cache: bool = False,
        last_token_ids: Any = None,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        mrope_params: Any = None,
        hidden_states: Any = None,
        prompt_embedding_table: Any = None,
        prompt_tasks: Any = None,
        prompt_vocab_size: Any = None,
        lora_params: Any = None,
        spec_decoding_params: Any = None,
    ) -> Any:
        """Mark the hidden states of all tokens as the output.

        Args and their order are those of DecoderModelForCausalLM.forward: what ``prepare_inputs`` returns.
        ``last_token_ids`` stays an input of the engine, and nothing reads it.
        """
        if use_cache:
            raise ValueError("the text encoder has no key-value cache; build it with --kv_cache_type disabled")
        optional = {
            "mrope_params": mrope_params,
            "hidden_states": hidden_states,
            "prompt_embedding_table": prompt_embedding_table,
            "prompt_tasks": prompt_tasks,
            "prompt_vocab_size": prompt_vocab_size,
            "lora_params": lora_params,
            "spec_decoding_params": spec_decoding_params,
        }
        states = self.transformer.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=Attention.fill_attention_params(self, attention_params),
            **{name: value for name, value in optional.items() if value is not None},
        )
        states.mark_output("hidden_states", "float32")
        return states
