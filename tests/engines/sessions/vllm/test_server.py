"""The language model on a server of vLLM: the same numbers, nothing half, a sentence for everything that is wrong."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import BackendMissingError, EngineError, RequestError
from qie.engines.sessions.load import SESSIONS
from qie.engines.sessions.vllm import connection
from tests.engines.sessions.vllm.conftest import Inputs
from tests.support.bundles import build
from tests.support.images import smooth_image
from tests.support.vllm.server import Served, serve


@pytest.fixture
def server(bundle: Path) -> Iterator[Served]:
    with serve(bundle) as served:
        yield served


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def language(opened: Bundle, served: Served, inputs: Inputs, *instructions: str, images: int = 2) -> list[NDArray[Any]]:
    vision, prompts = inputs(images, *instructions)
    embeds = served.reference.stages.vision(vision)
    return Stages(opened, vllm_url=served.url).language(prompts, embeds)


@pytest.mark.parametrize("images", [1, 3])
def test_the_numbers_are_those_of_the_graph(images: int, opened: Bundle, server: Served, inputs: Inputs) -> None:
    texts = ("make it red", " ", "größer –  “blue” 雪\n<|im_end|> e\u0301 ")
    vision, prompts = inputs(images, *texts)
    expected = server.reference.stages.language(prompts, server.reference.stages.vision(vision))
    for one, other in zip(expected, language(opened, server, inputs, *texts, images=images), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_edit_equals_that_of_the_bundle_and_its_own_engine_is_not_loaded(
    opened: Bundle, server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(images=[smooth_image(150, 90)], instructions=["x"], seeds=[3], steps=2, guidance=2)
    with Editor(opened) as editor:
        expected = np.asarray(editor.edit(request).images[0])
    loaded: list[str] = []
    load = SESSIONS["onnxruntime"]
    monkeypatch.setitem(SESSIONS, "onnxruntime", lambda *args: loaded.append(args[1].component) or load(*args))
    with Editor(opened, vllm_url=f"{server.url}/v1/") as editor:
        np.testing.assert_array_equal(np.asarray(editor.edit(request).images[0]), expected)
        assert "language" not in editor.stages.engines
    assert loaded == ["vision", "vae_encoder", "transformer", "vae_decoder"]
    assert [path for path, _ in server.requests] == ["/v1/models", *["/tokenize", "/pooling"] * 2]


def test_a_bundle_whose_language_model_does_not_run_here_runs_with_a_server(
    checkpoint: Path, server: Served, inputs: Inputs, tmp_path: Path
) -> None:
    recipe = 'extends = "cpu"\n[components.language]\nbackend = "vllm"\n'
    bundle = build(checkpoint, tmp_path / "language", recipe)
    with pytest.raises(BackendMissingError, match="language is built for vllm"):
        Stages(bundle)
    vision, prompts = inputs(1)
    stages = Stages(bundle, vllm_url=server.url)
    embeds = stages.vision(vision)
    expected = server.reference.stages.language(prompts, embeds)
    np.testing.assert_array_equal(stages.language(prompts, embeds)[0], expected[0])


def test_what_is_sent_is_what_docs_vllm_md_says(opened: Bundle, server: Served, inputs: Inputs) -> None:
    language(opened, server, inputs)
    sent = dict(server.requests)
    assert sent["/tokenize"]["prompt"].count("<|image_pad|>") == 2
    assert sent["/pooling"]["use_activation"] is False and sent["/pooling"]["task"] == "token_embed"
    parts = [part["type"] for part in sent["/pooling"]["messages"][0]["content"]]
    assert parts == ["text", "image_embeds", "text", "image_embeds", "text"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"use_activation": True}, "normalizes the hidden states to length 1; start it .* use_activation false"),
        ({"mm_embeds": False}, r"takes no embeddings of images \(400, You must .*\); start it with enable-mm-embeds"),
        ({"drop": 16}, r"returned \d+ hidden states for a prompt of \d+ tokens, .* a prefix cache; start it as"),
        ({"before": "system\n"}, r"returned \d+ hidden states for a prompt of \d+ tokens, .* chat template adds text"),
        ({"width": 8}, "has a model of width 8, expected [0-9]+; serve the text encoder of the model"),
        ({"max_model_len": 70}, r"takes prompts of 70 tokens, and this one has \d+; start it with a larger"),
        ({"answers": {"/v1/models": (404, b"<html>")}}, r"answered with 404 \(<html>\); start vLLM's server"),
        ({"answers": {"/v1/models": (200, b"<html>")}}, "is not one of vLLM with one model .*; correct the URL"),
        ({"answers": {"/v1/models": (200, b'{"data": []}')}}, "is not one of vLLM with one model .*; correct the URL"),
        ({"answers": {"/tokenize": (200, b'{"tokens": [1, 2]}')}}, "makes other tokens of the prompt"),
        ({"answers": {"/tokenize": (404, b'{"detail": "Not Found"}')}}, r"answered with 404 \(Not Found\)"),
        ({"answers": {"/pooling": (404, b'{"detail": "Not Found"}')}}, r"does not return hidden states \(404, "),
        ({"answers": {"/pooling": (500, b"boom")}}, r"refuses the prompt \(500, boom\); see its log"),
        ({"answers": {"/pooling": (200, b"{}")}}, "returned no hidden states of all tokens .*; start it"),
        ({"answers": {"/pooling": (0, b"")}}, "broke off|there is no vLLM server"),
        ({"key": "secret"}, r"answered with 401 \(Unauthorized\); set VLLM_API_KEY to its key"),
    ],
)  # fmt: skip
def test_a_server_that_is_not_right_is_refused_in_a_sentence(
    fault: dict[str, Any], sentence: str, opened: Bundle, server: Served, inputs: Inputs
) -> None:
    for name, value in fault.items():
        setattr(server, name, value)
    with pytest.raises(EngineError, match=sentence) as refused:
        language(opened, server, inputs)
    assert str(refused.value).count("; ") == 1 and server.url in str(refused.value)
    assert refused.value.option == "vllm_url"


def test_a_key_is_sent(opened: Bundle, server: Served, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert len(language(opened, server, inputs)) == 1


def test_no_server_and_a_server_that_does_not_answer_are_errors(
    opened: Bundle, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.2)
    vision, prompts = inputs()
    embeds = np.zeros((len(vision.raster_index), 8), np.float32)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(EngineError, match="gave no answer within 0.2 s; see its log"):
            Stages(opened, vllm_url=url).language(prompts, embeds)
    with pytest.raises(EngineError, match=r"there is no vLLM server at .* \(Connection refused\); start it"):
        Stages(opened, vllm_url=url).language(prompts, embeds)


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host", "http://", "http://h:x", "http://h/?a", "http://ü"]
)
def test_what_is_no_url_is_the_callers_mistake(url: str, opened: Bundle) -> None:
    with pytest.raises(RequestError, match="the URL of the vLLM server is .*; give one such as http://127"):
        Stages(opened, vllm_url=url)


def test_an_edit_without_a_server_imports_nothing_of_http() -> None:
    code = "import sys, qie.engines.editing.stages; print(sorted({'urllib.request', 'http.client'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_command_line_takes_a_server(
    server: Served, named_bundle: str, workplace: Path, qie: Any, refusal: Any
) -> None:
    words = ("run", "photo.png", "make it red", "--bundle", named_bundle, "--seed", "1", "--steps", "2")
    done: CompletedProcess[str] = qie(*words, "--vllm-url", server.url)
    assert done.returncode == 0, done.stderr
    server.use_activation = True
    assert "normalizes the hidden states" in refusal(qie(*words, "--vllm-url", server.url))
    assert "http://127.0.0.1:8000" in refusal(qie(*words, "--vllm-url", "nowhere"))
