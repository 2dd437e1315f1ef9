"""OpenAI's own package as the measure: every parameter is honoured or refused, every answer is what its types say."""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pytest
from openai.types import ImageEditCompletedEvent, ImageEditPartialImageEvent, ImagesResponse
from openai.types.image_edit_params import ImageEditParamsBase

from qie.engines.inputs.image import encode_image
from qie.engines.serving.http.fields import EDIT_FIELDS
from tests.support.images import smooth_image
from tests.support.servers import Server, serving

FILE = ("cat.png", encode_image(smooth_image(150, 90, seed=1), ".png"), "image/png")
LEAST: dict[str, Any] = {"image": FILE, "prompt": "make it red", "extra_body": {"steps": 2, "seed": 3}}

HONOURED: dict[str, list[Any]] = {
    "background": ["auto", "opaque"],
    "input_fidelity": ["high"],
    "n": [1, 2],
    "output_compression": [100],
    "output_format": ["png", "webp", "jpeg"],
    "partial_images": [0],
    "quality": ["auto"],
    "response_format": ["b64_json"],
    "safety_identifier": ["ann"],
    "size": ["auto", "128x96"],
    "user": ["ann"],
}
REFUSED: dict[str, list[Any]] = {
    "background": ["transparent"],
    "complexity": ["low"],
    "frame_count": [2],
    "frame_duration_ms": [200],
    "input_fidelity": ["low"],
    "markup": [FILE],
    "mask": [FILE],
    "model": ["gpt-image-2"],
    "n": [0, 11],
    "output_compression": [50],
    "output_format": ["gif", "svg"],
    "partial_images": [1],
    "quality": ["low", "medium", "high", "xhigh", "max", "standard"],
    "response_format": ["url"],
    "svg": [{"model": "x"}],
}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    with serving(bundle) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def given(name: str, value: Any) -> dict[str, Any]:
    """The arguments of a call, whether or not this version of the client has the parameter."""
    if name in typing.get_type_hints(ImageEditParamsBase):
        return {**LEAST, name: value}
    return {**LEAST, "extra_body": {**LEAST["extra_body"], name: value}}


def test_every_parameter_is_known_here() -> None:
    names = set(typing.get_type_hints(ImageEditParamsBase)) | {"stream"}
    assert names - set(HONOURED) - set(REFUSED) == {"image", "prompt", "stream"}
    assert set(HONOURED) <= set(EDIT_FIELDS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in HONOURED.items() for value in values])
def test_a_value_that_is_honoured(client: openai.OpenAI, name: str, value: Any) -> None:
    answer = client.images.edit(**given(name, value))
    ImagesResponse.model_validate(answer.to_dict(), strict=True)
    assert answer.data is not None and len(answer.data) == (value if name == "n" else 1)
    assert (
        answer.usage is not None and answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    )
    if name in ("user", "safety_identifier"):
        assert answer.safety_identifier == "ann"
    if name == "output_format":
        assert answer.output_format == value
    if name == "size" and value != "auto":
        assert answer.size == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_that_is_refused(client: openai.OpenAI, name: str, value: Any) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.images.edit(**given(name, value))
    assert refused.value.body is not None
    assert name in str(refused.value)


def test_the_events_of_a_stream(client: openai.OpenAI) -> None:
    events = list(client.images.edit(**LEAST, stream=True, partial_images=1, n=2))
    kinds: dict[str, Any] = {
        "image_edit.partial_image": ImageEditPartialImageEvent,
        "image_edit.completed": ImageEditCompletedEvent,
    }
    seen = []
    for event in events:
        if event.type in kinds:
            kinds[event.type].model_validate(event.to_dict(), strict=True)
            seen.append(event.type)
    assert sorted(set(seen)) == ["image_edit.completed", "image_edit.partial_image"]
    assert seen.count("image_edit.completed") == 2


def test_an_error_in_a_stream_is_raised(server: Server) -> None:
    from qie.engines.errors import LateError
    from qie.engines.serving.http.events import event
    from qie.engines.serving.http.problems import error

    content = event({"type": "error", "error": error(LateError("the edit was late; ask again"))})
    transport = httpx.MockTransport(
        lambda request: httpx.Response(200, content=content, headers={"content-type": "text/event-stream"})
    )
    with (
        httpx.Client(transport=transport) as http,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        pytest.raises(openai.APIError, match="the edit was late"),
    ):
        list(client.images.edit(**LEAST, stream=True))


def test_quality_is_what_the_types_allow() -> None:
    assert "auto" in get_args(ImageEditCompletedEvent.model_fields["quality"].annotation)
