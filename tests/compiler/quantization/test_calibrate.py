"""Calibration: what it sees is what the reference computes, and its files say no when they should."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.quantization.blockwise import run
from qie.compiler.quantization.calibration import Calibration, read_calibration, write_calibration
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.linears import linears
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.samples import (
    CalibrationSample,
    component_values,
    draw_samples,
    language_values,
    read_images,
    transformer_values,
)
from qie.compiler.validation.reference import load_reference
from qie.engines.errors import CalibrationError

Qie = Callable[..., CompletedProcess[str]]


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_samples_meet_each_other(image_folder: Path) -> None:
    drawn = draw_samples(read_images(image_folder, 32), INSTRUCTIONS, 32)
    positions = sorted(sample.position for sample in drawn)
    assert positions[0] < 0.05 and positions[-1] > 0.95
    assert max(np.diff(positions)) < 0.05
    assert sum(sample.text == " " for sample in drawn) == 8
    assert {sample.text for sample in drawn} > set(INSTRUCTIONS[:2])
    assert len({round(sample.image.width / sample.image.height, 1) for sample in drawn}) >= 4
    assert draw_samples(read_images(image_folder, 32), INSTRUCTIONS, 32)[7].text == drawn[7].text


def test_what_is_seen_is_what_the_reference_computes(
    checkpoint: Path,
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    samples: tuple[CalibrationSample, ...],
    calibration: Calibration,
) -> None:
    """The inputs of the reference's own linears, caught while it computes the same passes."""
    import torch

    reference = load_reference(checkpoint)
    amax: dict[str, np.ndarray] = {}

    def watch(module: torch.nn.Module, prefix: str) -> list[Any]:
        hooks = []
        for name, linear in module.named_modules():
            key = prefix + name
            if key in calibration.amax:

                def see(_: Any, inputs: tuple[torch.Tensor, ...], key: str = key) -> None:
                    x = inputs[0].detach().abs().flatten(0, -2).amax(0).numpy()
                    amax[key] = np.maximum(amax[key], x) if key in amax else x

                hooks.append(linear.register_forward_pre_hook(see))
        return hooks

    watch(reference.pipeline.transformer, "")
    words = language_values(tiny_checkpoint, readers, samples, quiet)

    run(GRAPHS["language"](tiny_checkpoint.model, "float32"), readers, words, quiet)
    prompts = [values["prompt_embeds"] for values in words]
    for sample, prompt in zip(samples, prompts, strict=True):
        np.testing.assert_allclose(
            reference.prompt_embeds([sample.image], sample.text), prompt[0], rtol=1e-3, atol=1e-4
        )
    steps = transformer_values(tiny_checkpoint, readers, samples, prompts, quiet)
    from qie.engines.inputs.prepare import prepare

    for sample, values in zip(samples, steps, strict=True):
        expected = reference.encode_image(prepare(sample.image, tiny_checkpoint.model.areas).vae).reshape(
            values["reference"].shape
        )
        np.testing.assert_allclose(values["reference"], expected, rtol=1e-3, atol=1e-4)
        grid = grid_of(tiny_checkpoint, sample)
        reference.velocity(
            values["latents"],
            [values["reference"]],
            values["prompt_embeds"],
            sigma_of(tiny_checkpoint, sample),
            [grid, grid],
        )
    seen = [name for name in calibration.amax if name in amax]
    assert set(seen) == set(linears(GRAPHS["transformer"](tiny_checkpoint.model, "float32")))
    noise_alone = (
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.to_out.0",
        "transformer_blocks.1.img_mlp",
    )
    for name in seen:
        if name.startswith(
            noise_alone
        ):  # the references' tokens end in the last block, and the reference computes them
            assert (calibration.amax[name] <= amax[name] * 1.002 + 1e-3).all(), name
        else:
            np.testing.assert_allclose(calibration.amax[name], amax[name], rtol=2e-3, atol=1e-3, err_msg=name)


def test_the_language_model_is_seen_too(tiny_checkpoint: Checkpoint, calibration: Calibration) -> None:
    names = linears(GRAPHS["language"](tiny_checkpoint.model, "float32"))
    assert names
    weights = {weight.name: weight for weight in GRAPHS["language"](tiny_checkpoint.model, "float32").weights}
    assert all(calibration.amax[name].shape == (weights[f"{name}.weight"].shape[0],) for name in names)
    assert calibration.smoothing_scales["int8-smooth"].keys() == calibration.alphas["int8-smooth"].keys()


def test_calibrating_again_gives_the_same_bytes(
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    samples: tuple[CalibrationSample, ...],
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    again = measure(tiny_checkpoint, readers, samples, model=tiny_checkpoint.digest())
    for number, one in enumerate((calibration, again)):
        write_calibration(one, tmp_path / f"{number}.npz")
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / "1.npz").read_bytes()
    back = read_calibration(tmp_path / "0.npz")
    assert back.amax.keys() == calibration.amax.keys()
    assert (back.model, back.name, back.samples, back.data) == (
        calibration.model,
        calibration.name,
        8,
        calibration.data,
    )
    assert all(
        np.array_equal(back.smoothing_scales[scheme][group], values)
        for scheme, factors in calibration.smoothing_scales.items()
        for group, values in factors.items()
    )


# Bad input


def damaged(calibration: Calibration, path: Path, **fields: Any) -> Path:
    values = {name: getattr(calibration, name) for name in Calibration.__dataclass_fields__} | fields
    write_calibration(Calibration(**values), path)
    return path


def test_a_calibration_of_another_model(
    qie: Qie, checkpoint: Path, calibration: Calibration, tmp_path: Path, refusal: Callable[[Any], str]
) -> None:
    file = damaged(calibration, tmp_path / "c.npz", model="0" * 64)
    done = qie("build", checkpoint, "--gpu", recipe(tmp_path), "--calibration", file, "--out", tmp_path / "b")
    said = refusal(done)
    assert "belongs to another model (tiny, 000000000000), expected" in said
    assert "qie calibrate" in said
    assert not (tmp_path / "b").exists()


def recipe(folder: Path, scheme: str = "int8-smooth") -> Path:
    path = folder / "q.toml"
    path.write_text(f'extends = "cpu"\n[components]\ntransformer = {{ precision = "float32", scheme = "{scheme}" }}\n')
    return path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda amax, name: amax.pop(name), "has no statistics of"),
        (lambda amax, name: amax.update({name: amax[name] * np.nan}), "has negative or non-finite values in amax/"),
        (lambda amax, name: amax.update({name: amax[name] * 0}), "has only zeros for the input of"),
        (lambda amax, name: amax.update({name: -amax[name]}), "has negative or non-finite values in amax/"),
    ],
)
def test_bad_statistics(
    qie: Qie,
    checkpoint: Path,
    calibration: Calibration,
    tmp_path: Path,
    refusal: Callable[[Any], str],
    change: Callable[[dict[str, np.ndarray], str], None],
    expected: str,
) -> None:
    amax = dict(calibration.amax)
    change(amax, "transformer_blocks.0.attn.to_q")
    file = damaged(calibration, tmp_path / "c.npz", amax=amax)
    done = qie("build", checkpoint, "--gpu", recipe(tmp_path), "--calibration", file, "--out", tmp_path / "b")
    assert expected in refusal(done)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"])
def test_no_calibration_at_all(qie: Qie, checkpoint: Path, tmp_path: Path, refusal: Any, content: bytes) -> None:
    (tmp_path / "c.npz").write_bytes(content)
    done = qie("build", checkpoint, "--gpu", recipe(tmp_path), "--calibration", tmp_path / "c.npz")
    assert "is not a qie calibration, or is damaged" in refusal(done)
    done = qie("build", checkpoint, "--gpu", recipe(tmp_path), "--calibration", tmp_path / "none.npz")
    assert "cannot read the calibration" in refusal(done)
    done = qie("export", checkpoint, "--gpu", recipe(tmp_path), "--out", tmp_path / "e", "--weights")
    assert "needs a calibration of this model; make one with `qie calibrate`" in refusal(done)


def test_the_command(
    qie: Qie, checkpoint: Path, image_folder: Path, workplace: Path, refusal: Callable[[Any], str]
) -> None:
    """Calibrate, build with it, edit; the bundle keeps what it was calibrated with."""
    (workplace / "words.txt").write_text("make it red\n\nadd a hat\n")
    done = qie(
        "calibrate", checkpoint, "--images", image_folder, "--instructions", "words.txt", "--samples", "4",
        "--sensitivity", "--scheme", "int8-smooth", "--budget", "0.004", "-o", "c.npz", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["linears"] > 20
    (ranking,) = said["sensitivity"]
    assert ranking["error_after_exclusion"] <= 0.004 < ranking["all_quantized_error"]
    assert json.loads((workplace / "c.sensitivity.json").read_text()) == said["sensitivity"]
    built = qie(
        "build", checkpoint, "--gpu", recipe(workplace), "--calibration", "c.npz", "--out", workplace / "b", "--json"
    )
    assert built.returncode == 0, built.stderr
    engines = json.loads(qie("inspect", workplace / "b", "--json").stdout)["manifest"]["engines"]
    assert "int8-smooth in" in qie("inspect", workplace / "b").stdout
    (record,) = [e["quantization"] for e in engines if e["component"] == "transformer"]
    assert record["scheme"] == "int8-smooth"
    assert record["quantized"] == len(ranking["errors"]) - len(ranking["exclude"])
    assert (workplace / "b" / "calibration.npz").read_bytes() == (workplace / "c.npz").read_bytes()
    done = qie("run", "photo.png", "make it red", "--bundle", workplace / "b", "--steps", "2", "-o", "o.png")
    assert done.returncode == 0, done.stderr
    again = qie("build", checkpoint, "--gpu", recipe(workplace), "--calibration", workplace / "b" / "calibration.npz",
                "--out", workplace / "b")  # fmt: skip
    assert again.returncode == 0, again.stderr

    shipping = workplace / "shipping.toml"  # a recipe may name the file
    shipping.write_text('extends = "q.toml"\ncalibration = "c.npz"\n')
    shipped = qie("build", checkpoint, "--gpu", shipping, "--out", workplace / "s")
    assert shipped.returncode == 0, shipped.stderr
    assert (workplace / "s" / "calibration.npz").read_bytes() == (workplace / "c.npz").read_bytes()
    assert str(workplace) not in (workplace / "s" / "manifest.json").read_text().replace(str(shipping), "")
    (workplace / "c.npz").unlink()
    assert "cannot read the calibration" in refusal(qie("build", checkpoint, "--gpu", shipping))

    for words, expected in (
        (("--images", workplace / "none"), "there is no folder"),
        (("--images", image_folder, "--scheme", "int3"), "unknown scheme 'int3', expected one of fp8,"),
        (
            ("--images", image_folder, "--component", "vision"),
            "unknown component 'vision', expected one of language, transformer; choose one (--component)",
        ),
    ):
        assert expected in refusal(qie("calibrate", checkpoint, *words))
    (workplace / "empty.txt").write_text("\n")
    assert "has no instruction" in refusal(
        qie("calibrate", checkpoint, "--images", image_folder, "--instructions", "empty.txt")
    )


def test_a_calibration_in_the_checkpoint_is_found(
    checkpoint: Path, calibration: Calibration, tmp_path: Path, qie: Qie
) -> None:
    import shutil

    folder = tmp_path / "with"
    shutil.copytree(checkpoint, folder)
    write_calibration(calibration, folder / "calibration.npz")
    done = qie("build", folder, "--gpu", recipe(tmp_path), "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("schema", [1, 99])
def test_another_schema_is_refused(calibration: Calibration, tmp_path: Path, monkeypatch: Any, schema: int) -> None:
    import qie.compiler.quantization.calibration as module

    monkeypatch.setattr(module, "SCHEMA", schema)
    write_calibration(calibration, tmp_path / "c.npz")
    monkeypatch.undo()
    with pytest.raises(
        CalibrationError, match=rf"has schema {schema}, expected 2; make it again with `qie calibrate`$"
    ):
        read_calibration(tmp_path / "c.npz")


def test_a_file_of_schema_1_is_refused(tmp_path: Path) -> None:
    """Its keys were others: ``most/NAME``, ``factor/SCHEME/GROUP`` and ``keep``."""
    about = {"schema": 1, "model": "m", "name": "n", "data": "d", "samples": 1, "alphas": {}, "keep": {}}
    np.savez(
        tmp_path / "c.npz",
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        **{"most/transformer_blocks.0.attn.to_q": np.ones(4, np.float32)},
    )
    with pytest.raises(CalibrationError, match=r"has schema 1, expected 2; make it again with `qie calibrate`$"):
        read_calibration(tmp_path / "c.npz")


def test_scales_are_those_of_modelopt(
    checkpoint: Path,
    tiny_checkpoint: Checkpoint,
    readers: dict[Any, TensorReader],
    samples: tuple[CalibrationSample, ...],
    calibration: Calibration,
) -> None:
    """NVIDIA's own calibration of the first block, over the same passes: ranges of inputs, and scales of weights."""
    quantization = pytest.importorskip("modelopt.torch.quantization")
    from qie.compiler.quantization.schemes import SCHEMES

    values = component_values("transformer", tiny_checkpoint, readers, samples, quiet)
    for scheme, config in (("fp8", quantization.FP8_DEFAULT_CFG), ("int8-smooth", quantization.INT8_DEFAULT_CFG)):
        rules, reference = SCHEMES[scheme], load_reference(checkpoint)
        assert rules.inputs is not None

        def passes(_: Any, reference: Any = reference) -> None:
            for sample, one in zip(samples, values, strict=True):
                grid = grid_of(tiny_checkpoint, sample)
                reference.velocity(
                    one["latents"],
                    [one["reference"]],
                    one["prompt_embeds"],
                    sigma_of(tiny_checkpoint, sample),
                    [grid, grid],
                )

        block = quantization.quantize(reference.pipeline.transformer.transformer_blocks[0], config, passes)
        compared = 0
        for name, linear in block.named_modules():
            key = f"transformer_blocks.0.{name}"
            if key in calibration.amax:
                scale = float(linear.input_quantizer.amax) / rules.inputs.qmax
                assert float(rules.inputs.scale_from_amax(calibration.amax[key].max())) == pytest.approx(
                    scale, rel=2e-3
                )
                weight = readers["transformer"].read(f"{key}.weight").astype(np.float32)
                theirs = linear.weight_quantizer.amax.numpy().reshape(-1) / rules.weights.qmax
                ours = rules.weights.scale(weight.T)
                np.testing.assert_allclose(ours if len(theirs) > 1 else ours.max(), theirs, rtol=1e-5)
                compared += 1
        assert (
            compared
            == sum(name.startswith("transformer_blocks.0.") for name in calibration.amax if "attn." not in name) + 8
        )


def grid_of(tiny_checkpoint: Checkpoint, sample: CalibrationSample) -> tuple[int, int]:
    """(height, width) in tokens."""
    from qie.engines.inputs.prepare import prepare

    height, width, _ = prepare(sample.image, tiny_checkpoint.model.areas).vae.shape
    return height // 16, width // 16


def sigma_of(tiny_checkpoint: Checkpoint, sample: CalibrationSample) -> float:
    from qie.engines.inputs.schedule import sigmas

    height, width = grid_of(tiny_checkpoint, sample)
    return float(
        sigmas(tiny_checkpoint.model.scheduler, steps=40, noise_tokens=height * width)[int(sample.position * 40)]
    )
