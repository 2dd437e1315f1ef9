"""The language model on TensorRT-LLM's stand-in: the same contract and the same embeddings as on onnxruntime."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import EngineRecord
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.editing.stages import Stages
from qie.engines.errors import BackendMissingError, BundleError, EngineError, EngineMismatchError, RequestError
from qie.engines.inputs.feeds import language_feed
from qie.engines.inputs.prompt import PREFIX_TOKENS, PromptTokens, encode
from qie.engines.inputs.vision import vision_inputs
from qie.engines.sessions import load
from qie.engines.sessions.choose import choose_engines
from qie.engines.sessions.device import Device
from qie.engines.sessions.tensorrt_llm.session import TensorRtLlmSession
from tests.support.fake_gpu import Gpu
from tests.support.images import smooth_image
from tests.support.trtllm import bundles

BFLOAT16 = 0.02
"""Relative L2 of embeddings computed from weights in bfloat16: measured 0.003; a wrong row or position gives 0.5."""


@pytest.fixture(scope="module")
def on_gpu(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gpu, Bundle]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder, gpu = tmp_path_factory.mktemp("trtllm"), Gpu()
        left = bundles.built(checkpoint, folder / "bundle")
        bundles.install(gpu, monkeypatch, folder / "bin")
        yield gpu, bundles.finished(left)


def record_of(bundle: Bundle) -> EngineRecord:
    return next(engine for engine in bundle.manifest.engines if engine.backend == "tensorrt-llm")


@pytest.fixture
def session(on_gpu: tuple[Gpu, Bundle]) -> Iterator[TensorRtLlmSession]:
    _, bundle = on_gpu
    device = Device("8.9")
    session = TensorRtLlmSession(bundle.path, record_of(bundle), device)
    yield session
    session.close()
    device.close()


@pytest.fixture(scope="module")
def prompt(bundle: Path) -> tuple[PromptTokens, np.ndarray, np.ndarray]:
    """A prompt about two images, their embeddings, and the prompt's embeddings on the CPU in float32."""
    opened = open_bundle(bundle)
    model = opened.manifest.model
    vision = vision_inputs([smooth_image(150, 90), smooth_image(60, 80, 1)], model.vision)
    tokens = encode(open_tokenizer(opened), ["make it red and larger"], vision.grids, model.prompt)
    stages = Stages(opened)
    images = stages.vision(vision)
    return tokens, images, stages.language([tokens], images)[0]


def run(session: TensorRtLlmSession, tokens: PromptTokens, images: np.ndarray) -> np.ndarray:
    feed = {name: session.upload(array) for name, array in language_feed(tokens, images).items()}
    sizes = {"batch": 1, "text_tokens": tokens.input_ids.shape[1] - PREFIX_TOKENS}
    embeds = session.empty("prompt_embeds", sizes)
    session.run(feed, {"prompt_embeds": embeds})
    return session.download(embeds)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_its_embeddings_are_those_of_onnxruntime(
    session: TensorRtLlmSession, prompt: tuple[PromptTokens, np.ndarray, np.ndarray]
) -> None:
    tokens, images, expected = prompt
    found = run(session, tokens, images)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert distance(found, expected) < BFLOAT16
    assert np.array_equal(run(session, tokens, images), found)


CHANGES: dict[str, Callable[[PromptTokens], PromptTokens]] = {
    "images in the other order": lambda t: changed(t, image_index=reversed_rows(t.image_index)),
    "positions of text": lambda t: changed(t, position_ids=np.arange(t.input_ids.size)[None, None].repeat(3, 0)),
    "height and width": lambda t: changed(t, position_ids=t.position_ids[[0, 2, 1]]),
}


def reversed_rows(image_index: np.ndarray) -> np.ndarray:
    return np.where(image_index < 0, -1, image_index.max() - image_index)


def changed(tokens: PromptTokens, **arrays: np.ndarray) -> PromptTokens:
    values = {name: getattr(tokens, name) for name in ("input_ids", "image_index", "position_ids", "lengths")}
    return PromptTokens(**(values | arrays))


@pytest.mark.parametrize("change", CHANGES)
def test_every_input_counts(
    session: TensorRtLlmSession, prompt: tuple[PromptTokens, np.ndarray, np.ndarray], bundle: Path, change: str
) -> None:
    """A change of the inputs changes the embeddings as it does on the CPU."""
    tokens, images, expected = prompt
    other = CHANGES[change](tokens)
    expected_change = Stages(open_bundle(bundle)).language([other], images)[0] - expected
    found_change = run(session, other, images) - run(session, tokens, images)
    assert distance(found_change, expected_change) < 0.1


def test_a_prompt_that_is_too_long(
    session: TensorRtLlmSession, prompt: tuple[PromptTokens, np.ndarray, np.ndarray]
) -> None:
    tokens, images, _ = prompt
    long = changed(
        tokens,
        input_ids=np.ones((1, 3000), np.int64),
        image_index=np.full((1, 3000), -1),
        position_ids=np.zeros((3, 1, 3000), np.int64),
    )
    with pytest.raises(RequestError, match="the prompt has 3000 tokens, the engine takes 2624; shorten the instruc"):
        run(session, long, images)
    with pytest.raises(RequestError, match="the prompt has 2100 image tokens, the engine takes 90"):
        run(session, tokens, images.repeat(100, axis=0))


def test_ids_beyond_the_vocabulary_are_no_images(
    session: TensorRtLlmSession, prompt: tuple[PromptTokens, np.ndarray, np.ndarray]
) -> None:
    tokens, images, _ = prompt
    with pytest.raises(BundleError, match="the tokenizer makes the id 768, and the language model has 768 of them"):
        run(session, changed(tokens, input_ids=np.where(tokens.image_index < 0, 768, tokens.input_ids)), images)


def test_other_tensors_are_our_own_mistake(session: TensorRtLlmSession) -> None:
    with pytest.raises(AssertionError, match="language: image_embeds, image_index, position_ids missing or unknown"):
        session.run({"input_ids": np.zeros((1, 70), np.int64)}, {"prompt_embeds": np.zeros((1, 6, 64), np.float32)})


def test_the_gpu_is_left_as_it_was(
    on_gpu: tuple[Gpu, Bundle], prompt: tuple[PromptTokens, np.ndarray, np.ndarray]
) -> None:
    gpu, bundle = on_gpu
    before = gpu.in_use
    device = Device("8.9")
    session = TensorRtLlmSession(bundle.path, record_of(bundle), device)
    run(session, *prompt[:2])
    assert gpu.in_use > before
    session.close()
    session.close()
    device.close()
    assert (gpu.in_use, gpu.crashes) == (before, [])


def test_a_small_gpu(on_gpu: tuple[Gpu, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, bundle = on_gpu
    monkeypatch.setattr(gpu, "memory_bytes", 1000)
    with pytest.raises(EngineError, match=r"language has [\d,]+ bytes, the GPU .* free .*residency = \"sequential\""):
        TensorRtLlmSession(bundle.path, record_of(bundle), Device("8.9"))


def copied(bundle: Bundle, folder: Path) -> Path:
    """A copy of the engine's folder, to be damaged."""
    place = folder / Path(record_of(bundle).path).parent
    place.mkdir(parents=True)
    for file in record_of(bundle).files:
        (folder / file.path).write_bytes((bundle.path / file.path).read_bytes())
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mapping": {"world_size": 2}}, "is of an engine for 2 GPUs, and an edit uses one"),
        ({"rotary_scaling": {}}, "is not the config of an engine of TensorRT-LLM"),
        ({"rotary_scaling": {"mrope_section": [1, 2, 3]}}, r"mrope_section \[1, 2, 3\] for heads of"),
        ({"max_position_embeddings": "many"}, "is not the config of an engine of TensorRT-LLM"),
        ({"max_position_embeddings": 10**12}, "expected a number from 1 to 131072"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, expected a whole number"),
        ({"rotary_base": float("inf")}, "rotary_base is inf"),
        ({"rotary_base": 10**400}, "is not the config of an engine of TensorRT-LLM"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rotary_scaling": {"mrope_section": [4, 6, 6, 0]}}, "expected three numbers"),
        ({"rotary_scaling": {"mrope_section": "888"}}, "expected three numbers"),
    ],
)
def test_another_config(on_gpu: tuple[Gpu, Bundle], tmp_path: Path, change: dict[str, object], message: str) -> None:
    _, bundle = on_gpu
    path = copied(bundle, tmp_path) / "config.json"
    content = json.loads(path.read_text())
    content["pretrained_config"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        TensorRtLlmSession(tmp_path, record_of(bundle), Device("8.9"))


@pytest.mark.parametrize("content", [b"", b"no engine", None])
def test_a_damaged_engine(on_gpu: tuple[Gpu, Bundle], tmp_path: Path, content: bytes | None) -> None:
    _, bundle = on_gpu
    path = copied(bundle, tmp_path) / "rank0.engine"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(BundleError, match=r"tensorrt-llm cannot load .*rank0\.engine .*build the bundle again"):
        TensorRtLlmSession(tmp_path, record_of(bundle), Device("8.9"))


def test_an_engine_with_other_outputs(on_gpu: tuple[Gpu, Bundle], tmp_path: Path) -> None:
    """Such as one that trtllm-build made without the class of the checkpoint."""
    _, bundle = on_gpu
    path = copied(bundle, tmp_path) / "rank0.engine"
    path.write_bytes(path.read_bytes().replace(b'"hidden_states"', b'"other_states1"'))
    with pytest.raises(BundleError, match="takes other_states1, so it was not built from the checkpoint in its bundle"):
        TensorRtLlmSession(tmp_path, record_of(bundle), Device("8.9"))


def test_another_version_is_not_chosen(on_gpu: tuple[Gpu, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = on_gpu
    monkeypatch.setattr("qie.engines.sessions.choose.version", lambda backend: "1.3.0")
    monkeypatch.setattr("qie.engines.sessions.choose.serves_gpu", lambda: True)
    monkeypatch.setattr("qie.engines.sessions.choose.cuda_lacking", lambda backend, served: None)
    assert choose_engines(bundle)["language"][0].backend == "onnxruntime"
    alone = [e for e in bundle.manifest.engines if e.component != "language" or e.backend == "tensorrt-llm"]
    monkeypatch.setattr(type(bundle.manifest), "engines", tuple(alone), raising=False)
    with pytest.raises(EngineMismatchError, match=r"tensorrt-llm/8\.9, version 1\.2\.1, but version 1\.3\.0 is inst"):
        choose_engines(bundle)


def test_the_package_does_not_load(on_gpu: tuple[Gpu, Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    _, bundle = on_gpu

    def fail(name: str) -> None:
        raise ImportError("libmpi.so.40: cannot open shared object file")

    monkeypatch.setattr("qie.engines.sessions.tensorrt_llm.session.import_module", fail)
    with pytest.raises(BackendMissingError, match=r"installed but does not load \(libmpi\.so\.40.*install it again"):
        TensorRtLlmSession(bundle.path, record_of(bundle), Device("8.9"))


def test_it_is_loaded_by_name(on_gpu: tuple[Gpu, Bundle]) -> None:
    _, bundle = on_gpu
    device = Device("8.9")
    session = load.load(bundle.path, record_of(bundle), device)
    assert isinstance(session, TensorRtLlmSession)
    session.close()
