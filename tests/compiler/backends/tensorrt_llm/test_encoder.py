"""The model class, against a stand-in for the names of TensorRT-LLM 1.2.1 that it uses.

The stand-in has the signatures, and the registration of modules, of tensorrt_llm/module.py, models/modeling_utils.py,
models/qwen/model.py and layers/attention.py.
"""

import importlib.util
import inspect
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from qie.compiler.backends.tensorrt_llm.command import ENCODER_CLASS, ENCODER_SOURCE

CONFIG = SimpleNamespace(quant_mode="quant", mapping="mapping")

PREPARED = {
    "input_ids": "ids",
    "position_ids": "positions",
    "use_cache": False,
    "last_token_ids": "last",
    "attention_mask": None,
    "kv_cache_params": "cache",
    "attention_params": "attention",
    "prompt_embedding_table": "table",
    "prompt_tasks": "tasks",
    "prompt_vocab_size": "size",
    "mrope_params": "mrope",
}
"""What PretrainedModel.prepare_inputs returns for a prompt table, rotary tables and no key-value cache."""


class Module:
    """Keeps modules apart from other attributes: one that was registered stays when its attribute becomes None."""

    def __init__(self) -> None:
        self.__dict__["_modules"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Module):
            self._modules[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        raise AttributeError(name)

    def named(self) -> list[str]:
        return sorted(self._modules)


class PostInit(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = super().__call__(*args, **kwargs)
        model.__post_init__()
        return model


class Decoder(Module, metaclass=PostInit):
    def __init__(self, config: Any, transformer: Module, lm_head: Module | None) -> None:
        super().__init__()
        self.config = config
        self.transformer = transformer
        self.lm_head = lm_head

    def __post_init__(self) -> None:
        self.quantized = self.named()

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
        raise AssertionError("the head would run")


class QWen(Decoder):
    config_class = "QWenConfig"

    def __init__(self, config: Any) -> None:
        super().__init__(config, Transformer(config), Module())


class States:
    def __init__(self) -> None:
        self.outputs: list[tuple[str, str]] = []

    def mark_output(self, name: str | None = None, dtype: str | None = None) -> None:
        assert name is not None and dtype is not None
        self.outputs.append((name, dtype))


class Transformer(Module):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(
        self,
        input_ids: Any,
        position_ids: Any = None,
        use_cache: bool = False,
        spec_decoding_params: Any = None,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        mrope_params: Any = None,
        hidden_states: Any = None,
        prompt_embedding_table: Any = None,
        prompt_tasks: Any = None,
        prompt_vocab_size: Any = None,
        lora_params: Any = None,
    ) -> States:
        self.received = {name: value for name, value in locals().items() if name != "self"}
        return States()


class Attention(Module):
    @staticmethod
    def fill_attention_params(model_cls: Any, attention_params: Any) -> Any:
        assert isinstance(model_cls, Decoder)
        return f"{attention_params} with rotary constants"


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, loaded as trtllm-build does: from its file, as a module named ``models``."""
    names = {
        "tensorrt_llm": {},
        "tensorrt_llm.layers": {"Attention": Attention},
        "tensorrt_llm.models": {"QWenForCausalLM": QWen},
        "tensorrt_llm.models.modeling_utils": {"DecoderModelForCausalLM": Decoder},
        "tensorrt_llm.models.qwen": {},
        "tensorrt_llm.models.qwen.model": {"QWenModel": Transformer},
    }
    for name, content in names.items():
        made = ModuleType(name)
        vars(made).update(content)
        monkeypatch.setitem(sys.modules, name, made)
    spec = importlib.util.spec_from_file_location("models", ENCODER_SOURCE)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, ENCODER_CLASS)


def test_no_language_head_exists(encoder: Any) -> None:
    """Neither when weights are loaded nor when linears are quantized, which happens behind __init__."""
    model = encoder(CONFIG)
    assert model.named() == model.quantized == ["transformer"]
    assert model.lm_head is None
    assert (model.config, model.quant_mode, model.mapping) == (CONFIG, "quant", "mapping")
    assert QWen(CONFIG).named() == ["lm_head", "transformer"]  # what the class avoids


def test_hidden_states_are_the_only_output(encoder: Any) -> None:
    model = encoder(CONFIG)
    states = model.forward(**PREPARED)
    assert states.outputs == [("hidden_states", "float32")]
    expected = {**PREPARED, "attention_params": "attention with rotary constants"}
    del expected["last_token_ids"]
    assert {name: value for name, value in model.transformer.received.items() if value is not None} == {
        name: value for name, value in expected.items() if value is not None
    }


def test_a_key_value_cache_is_refused(encoder: Any) -> None:
    with pytest.raises(ValueError, match="--kv_cache_type disabled"):
        encoder(CONFIG).forward(**{**PREPARED, "use_cache": True})


def test_its_arguments_are_those_of_the_class_above(encoder: Any) -> None:
    ours, theirs = (list(inspect.signature(cls.forward).parameters.values()) for cls in (encoder, Decoder))
    assert [(each.name, each.default) for each in ours] == [(each.name, each.default) for each in theirs]
    assert encoder.config_class == "QWenConfig"
