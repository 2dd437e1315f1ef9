"""What the stand-ins of ``tests/support/vllm`` take and answer is what the real vLLM takes and answers."""

import dataclasses
import inspect

from tests.support.vllm.package import vllm as stand_in
from tests.support.vllm.server import POOLING


def test_the_arguments_of_the_stand_in_are_those_of_llm() -> None:
    from vllm import LLM, EngineArgs

    named = set(inspect.signature(LLM.__init__).parameters)
    assert set(stand_in.KNOWN) <= named | {field.name for field in dataclasses.fields(EngineArgs)}
    assert set(stand_in.ENCODE) <= set(inspect.signature(LLM.encode).parameters)
    assert list(inspect.signature(LLM.apply_model).parameters) == ["self", "func"]


def test_the_outputs_are_those_of_the_stand_in() -> None:
    from vllm.outputs import PoolingOutput, PoolingRequestOutput

    assert {"outputs", "prompt_token_ids"} <= set(inspect.signature(PoolingRequestOutput.__init__).parameters)
    assert "data" in {field.name for field in dataclasses.fields(PoolingOutput)}


def test_the_platform_says_whether_it_is_a_cpu() -> None:
    from vllm.platforms import current_platform

    assert isinstance(current_platform.is_cpu(), bool)


def test_the_fields_of_requests_are_known_to_the_server() -> None:
    from vllm.entrypoints.pooling.pooling.protocol import PoolingChatRequest
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeCompletionRequest

    assert set(PoolingChatRequest.model_fields) >= POOLING
    assert set(TokenizeCompletionRequest.model_fields) >= {"model", "prompt", "add_special_tokens"}
