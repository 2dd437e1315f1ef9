"""Keys that are right by themselves and contradict each other."""

from pathlib import Path

import pytest

from qie.compiler.recipe.load import load_recipe
from tests.support.recipes import GPU, refusal, write


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[components.transformer]\nprecision = 'float16'", 'transformer.precision in FILE is "float16", which overf'),
        ("[components.vae_encoder]\nscheme = 'fp8'", "vae_encoder cannot be quantized; use"),
        ("[components.vision]\nscheme = 'int8-smooth'", "vision cannot be quantized; use"),
        ("[components.vae_decoder]\nattention = 'fp8'", "vae_decoder cannot be quantized; use"),
        ("[components.vision]\nparts = 2", "components.vision.parts in FILE is 2, but vision cannot be divided; leave"),
        ("[components.transformer]\nparts = 65", "parts in FILE is 65; set it to a whole number from 1 to 64"),
        ("[components.transformer]\nparts = 1.5", "parts in FILE is 1.5; set it to a whole number from 1 to 64"),
        (
            "[components.language]\nbackend = 'tensorrt-llm'\nparts = 2",
            'components.language.backend in FILE is "tensorrt-llm", which is built whole and not in parts; name',
        ),
        ("[limits]\nbuild_workspace_gib = 25", "limits.build_workspace_gib in FILE is more than memory_gib (24)"),
        ("[shapes]\nbatch = { opt = 9 }", "shapes.batch in FILE is { min = 1, opt = 9, max = 4 }; choose values"),
        ("[shapes]\nprompt_tokens = { min = 300 }", "shapes.prompt_tokens in FILE is { min = 300, opt = 256"),
        ("[shapes]\nreferences = { max = 4 }", "shapes.references.max in FILE is 4, expected at most 3; lower it"),
        ("[shapes]\naspect_ratios = []", "shapes.aspect_ratios in FILE is empty"),
        (
            "[[schedules]]\nsteps = 4\nguidance = 1\nsizes = ['7:5']",
            "schedules[0].sizes in FILE has 7:5, not in shapes",
        ),
        ("[[schedules]]\nsteps = 4\nguidance = 1\nsizes = []", "schedules[0].sizes in FILE is empty"),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, GPU + text)


def test_a_recipe_needs_a_schedule(tmp_path: Path) -> None:
    assert "schedules in FILE is empty" in refusal(tmp_path, "schedules = []" + GPU)


@pytest.mark.parametrize(
    ("capability", "allowed"), [("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True), ("12.0", True)]
)
def test_fp8_needs_the_hardware(tmp_path: Path, capability: str, allowed: bool) -> None:
    text = GPU.replace("8.9", capability) + "[components.transformer]\nscheme = 'fp8'"
    if allowed:
        assert load_recipe(write(tmp_path, text)).components.transformer.scheme == "fp8"
    else:
        message = refusal(tmp_path, text)
        assert f"needs compute capability 8.9 or later, not Test GPU ({capability}); use" in message


@pytest.mark.parametrize(
    ("capability", "backends", "refused"),
    [
        ("8.0", ["tensorrt"], "needs compute capability 8.9 or later"),
        (
            "8.9",
            ["tensorrt"],
            "backends has tensorrt, whose attention kernels for Test GPU (8.9) do not",
        ),
        ("8.9", ["tensorrt-rtx"], "backends has tensorrt-rtx, whose attention kernels"),
        ("9.0", ["tensorrt"], None),
        ("9.0", ["tensorrt", "onnxruntime"], None),  # no component that is quantized goes to onnxruntime
        ("12.0", ["tensorrt", "tensorrt-rtx"], 'kernels for Test GPU (12.0) do not compute in FP8; use "none"'),
    ],
)
def test_fp8_attention_needs_kernels(tmp_path: Path, capability: str, backends: list[str], refused: str | None) -> None:
    text = GPU.replace("8.9", capability).replace('["tensorrt"]', str(backends))
    text += "[components.language]\nattention = 'fp8'"
    if refused is None:
        assert load_recipe(write(tmp_path, text)).components.language.attention == "fp8"
    else:
        assert refused in refusal(tmp_path, text)


def test_a_cpu_has_no_bfloat16_and_no_tensorrt(tmp_path: Path) -> None:
    """FP8 it has: onnxruntime computes what comes out of the codes, which is how a scheme is judged without a GPU."""
    load_recipe(write(tmp_path, 'extends = "cpu"\n[components.language]\nscheme = "fp8"'))
    assert 'components.vision.precision in FILE is "bfloat16", for which onnxruntime has no kernels' in refusal(
        tmp_path, 'extends = "cpu"\n[components.vision]\nprecision = "bfloat16"'
    )
    assert "backends in FILE has tensorrt, which needs a GPU" in refusal(
        tmp_path, 'extends = "cpu"\nbackends = ["onnxruntime", "tensorrt"]'
    )


def test_kernels_for_every_shape_are_tensorrts_for_rtx(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GPU + "specialization = 'none'")).specialization == "none"
    message = refusal(tmp_path, GPU + "specialization = 'eager'")
    assert "specialization in" in message and 'for which backends needs tensorrt-rtx; use "none"' in message
