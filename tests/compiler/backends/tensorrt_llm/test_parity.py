"""A checkpoint that qie writes for TensorRT-LLM, executed by the independent reader, against transformers.

Bounds are relative L2 distances of the last hidden states from transformers in float32. Random weights are the worst
case for quantization: they have no structure that a scale could follow.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qie.compiler.backends.tensorrt_llm.checkpoint import write_checkpoint
from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.configs import LanguageConfig
from qie.compiler.checkpoint.safetensors import TensorReader, open_file
from qie.compiler.metrics.error import relative_l2
from qie.compiler.recipe.schema import SchemeName
from qie.compiler.selftest.recording import RecordingStages, Run
from qie.compiler.weights.weight import DType
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from tests.support.images import smooth_image
from tests.support.trtllm.by_hand import POSITIONS, rewrite, write_by_hand
from tests.support.trtllm.checkpoint import open_decoder
from tests.support.trtllm.prompt import hidden_states
from tests.support.trtllm.small import EPS, INTERMEDIATE, LAYERS, SECTION, THETA, VOCABULARY, WIDTH, Small
from tests.support.trtllm.stored import Array, Floats, write_tensors

LAYER = "transformer.layers.0."
SCHEMES: dict[SchemeName, tuple[str | None, float]] = {
    "none": (None, 1e-5),
    "fp8": ("FP8", 0.08),
    "int8-smooth": ("W8A8_SQ_PER_CHANNEL", 0.04),
    "w8a16": ("W8A16", 0.02),
    "w4a16": ("W4A16_AWQ", 0.3),
}
"""Scheme -> algorithm of TensorRT-LLM, and the bound; measured in float32: 6.2e-7, 0.063, 0.030, 0.013, 0.20."""

Tensors = dict[str, Array]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def reader(decoder: Small, tmp_path_factory: pytest.TempPathFactory) -> TensorReader:
    path = tmp_path_factory.mktemp("text-encoder") / "model.safetensors"
    write_tensors(path, dict(decoder.weights))
    return open_file(path)


@pytest.fixture(scope="session")
def write(decoder: Small, reader: TensorReader, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The checkpoint of a scheme, written once and not to be changed: ``write("fp8", tensor_parallel=2)``."""
    root = tmp_path_factory.mktemp("written")

    def call(
        scheme: SchemeName, *, dtype: DType = "float32", tensor_parallel: int = 1, only: str = "language_model."
    ) -> Path:
        config = LanguageConfig(
            layers=LAYERS,
            width=WIDTH,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            intermediate=INTERMEDIATE,
            vocabulary=VOCABULARY,
            eps=EPS,
            rope_theta=THETA,
            mrope_section=SECTION,
        )
        folder = root / f"{scheme}-{dtype}-{tensor_parallel}-{only}"
        if folder.exists():
            return folder
        settings = Settings(
            config=config,
            dtype=dtype,
            scheme=scheme,
            amax={n: a for n, a in decoder.inputs.items() if n.startswith(only) and scheme != "none"},
            positions=POSITIONS,
            tensor_parallel=tensor_parallel,
        )
        folder.mkdir()
        names = write_checkpoint(settings, reader, folder)
        assert sorted(names) == sorted(["config.json", *(f"rank{rank}.safetensors" for rank in range(tensor_parallel))])
        assert all((folder / name).is_file() for name in names)
        return folder

    return call


def run(folder: Path, prompt: Small) -> Floats:
    decoder = open_decoder(folder)
    assert decoder.config.mrope
    return decoder(decoder.embed(prompt.ids, prompt.image), prompt.rotary(POSITIONS))


def distance(folder: Path, prompt: Small) -> float:
    return relative_l2(run(folder, prompt), prompt.expected)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_within_its_bound(
    decoder: Small, write: Write, scheme: SchemeName, tensor_parallel: int
) -> None:
    folder = write(scheme, tensor_parallel=tensor_parallel)
    algorithm, bound = SCHEMES[scheme]
    loaded = open_decoder(folder).config
    assert (loaded.quant_algo, loaded.tp, loaded.positions) == (algorithm, tensor_parallel, POSITIONS)
    found = distance(folder, decoder)
    assert found < bound
    assert scheme == "none" or found > bound / 20  # it is quantized


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scheme_is_worse_than_the_plain_recipe(
    decoder: Small, write: Write, scheme: SchemeName, tmp_path: Path
) -> None:
    """Rounding to the scales that the largest magnitudes give is what a checkpoint made by hand has."""
    by_hand = distance(write_by_hand(tmp_path / "by-hand", decoder, SCHEMES[scheme][0]), decoder)
    assert distance(write(scheme), decoder) < 1.15 * by_hand + 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16(decoder: Small, write: Write, scheme: SchemeName) -> None:
    """Weights and scales are in bfloat16; sums are in float32 here."""
    assert distance(write(scheme, dtype="bfloat16"), decoder) < SCHEMES[scheme][1] + 0.01


@pytest.mark.parametrize("tensor_parallel", [2, 4])
@pytest.mark.parametrize("scheme", ["none", "int8-smooth", "w8a16", "w4a16"])
def test_ranks_together_are_the_whole(decoder: Small, write: Write, scheme: SchemeName, tensor_parallel: int) -> None:
    """Scales of channels and groups do not change with the split, but for the channels of what is split by inputs."""
    whole, split = run(write(scheme), decoder), run(write(scheme, tensor_parallel=tensor_parallel), decoder)
    same = scheme in ("none", "w4a16")
    assert relative_l2(split, whole) < (1e-5 if same else SCHEMES[scheme][1])


@pytest.mark.parametrize("scheme", ["fp8", "w8a16"])
def test_a_linear_without_amax_is_not_quantized(decoder: Small, write: Write, scheme: SchemeName) -> None:
    everything = distance(write(scheme), decoder)
    folder = write(scheme, tensor_parallel=2, only="language_model.layers.1.mlp.")
    loaded = open_decoder(folder).config
    assert not loaded.is_quantized(LAYER + "attention.qkv")
    assert loaded.is_quantized("transformer.layers.1.mlp.fc")
    assert 1e-4 < distance(folder, decoder) < everything


def exchange(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for kind in ("weight", "weights_scaling_factor"):
            if (first := f"{LAYER}{one}.{kind}") in tensors:
                second = f"{LAYER}{other}.{kind}"
                tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def exchange_key_and_value(tensors: Tensors) -> None:
    """Of every tensor of qkv whose first dim is the outputs, or half of them."""
    for name, tensor in tensors.items():
        if name.startswith(f"{LAYER}attention.qkv.") and len(tensor) >= WIDTH and "prequant" not in name:
            q, k, v = np.split(tensor, [len(tensor) // 2, len(tensor) // 4 * 3])
            tensors[name] = np.concatenate([q, v, k])


def no_bias(tensors: Tensors) -> None:
    tensors[f"{LAYER}attention.qkv.bias"] = np.zeros_like(tensors[f"{LAYER}attention.qkv.bias"])


def double(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        scale = tensors[LAYER + name]
        tensors[LAYER + name] = (scale * 2).astype(scale.dtype)

    return change


MUTATIONS = {
    "fc and gate": exchange("mlp.fc", "mlp.gate"),
    "key and value": exchange_key_and_value,
    "bias": no_bias,
}
SCALES = {
    "fp8": "mlp.proj.weights_scaling_factor",
    "int8-smooth": "mlp.proj.weights_scaling_factor",
    "w4a16": "mlp.proj.weights_scaling_factor",
}


@pytest.mark.parametrize("mutation", [*MUTATIONS, "scale"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_file_is_outside_the_bound(
    decoder: Small, write: Write, tmp_path: Path, scheme: SchemeName, mutation: str
) -> None:
    folder = shutil.copytree(write(scheme), tmp_path / "changed")
    change = MUTATIONS.get(mutation) or double(SCALES.get(scheme, "input_layernorm.weight"))
    assert distance(rewrite(folder, change), decoder) > SCHEMES[scheme][1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tensor_less_does_not_load(write: Write, tmp_path: Path, scheme: SchemeName) -> None:
    folder = shutil.copytree(write(scheme), tmp_path / "changed")
    rewrite(folder, lambda tensors: tensors.pop(f"{LAYER}attention.qkv.bias"))
    with pytest.raises(RuntimeError, match="Required but not provided"):
        open_decoder(folder)


def test_the_prompt_of_an_edit_as_in_qies_own_graph(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """What onnxruntime computes from the language model's graph in an edit of two images."""
    runs: list[Run] = []
    opened = open_bundle(str(bundle))
    editor = Editor(opened)
    editor.stages = RecordingStages(opened, runs)
    images = [smooth_image(150, 90), smooth_image(60, 80, 1)]
    editor.edit(Request(images=images, instructions=["make it red"], seeds=[3], steps=1, guidance=1.0))
    editor.close()
    (run,) = [run for run in runs if run.component == "language"]
    source = open_checkpoint(str(checkpoint))
    settings = Settings(config=source.model.language, dtype="float32", scheme="none", amax={}, positions=512)
    write_checkpoint(settings, source.reader("text_encoder"), tmp_path)
    (expected_BLD,) = run.outputs.values()
    hidden_SD = hidden_states(tmp_path, run.inputs)
    assert len(set(map(tuple, run.inputs["position_ids"][:, 0].T[64:]))) > 20
    assert relative_l2(hidden_SD[-expected_BLD.shape[1] :], expected_BLD[0]) < 1e-5
