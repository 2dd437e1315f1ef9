"""Everything that can be wrong from outside: one sentence that says what to do, exit code 2, nothing left behind."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qie.compiler.backends import BUILDERS
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.files import sha256_of

Qie = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]
Break = Callable[[Path], object]

TINY = ARCHITECTURES["tiny"]
RUN = ("--steps", "2", "--cfg", "1")


@pytest.fixture(autouse=True)
def nothing_is_left(workplace: Path, qie_home: Path) -> Iterator[None]:
    """What a refused command must not leave: an image, a bundle, or a part of either."""
    yield
    assert not [path for path in workplace.rglob("*") if path.name.startswith(".") or "edited" in path.name]
    assert not [path for path in (qie_home / "bundles").glob("*") if path.name.startswith(".")]


def assert_says(said: str, expected: str) -> None:
    assert re.search(expected, said), said


def png(width: int, height: int) -> bytes:
    """A PNG that says that it is of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Images


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_IMAGES: dict[str, tuple[Break, str]] = {
    "missing": (lambda path: path.unlink(), "There is no image photo.png; check the path"),
    "cut short": (cut, "photo.png is a damaged or truncated image .*; take an intact copy"),
    "empty": (lambda path: path.write_bytes(b""), "photo.png is an empty file"),
    "text": (lambda path: path.write_text("Dear diary"), "photo.png is not a PNG, JPEG or WebP image .*; convert it"),
    "huge": (
        lambda path: path.write_bytes(png(50_000, 50_000)),
        r"photo.png is 50,000 x 50,000 pixels, 2,500 megapixels, .*; make it smaller",
    ),
    "thin": (lambda path: Image.new("RGB", (5000, 10)).save(path), "5,000 x 10 pixels.*; crop it"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "photo.png is a folder; name one image file"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    break_it, expected = BAD_IMAGES[name]
    break_it(workplace / "photo.png")
    said = refusal(qie("run", "photo.png", "make it red", "--bundle", bundle))
    assert_says(said, expected)


def test_image_in_a_process_of_its_own(process: Qie, refusal: Refusal, workplace: Path, bundle: Path) -> None:
    cut(workplace / "photo.png")
    done = process("run", "photo.png", "make it red", "--bundle", bundle)
    assert_says(refusal(done), "truncated")
    assert done.stdout == ""


def test_one_bad_image_among_good_ones(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path) -> None:
    (workplace / "bad.png").write_text("no image")
    assert_says(refusal(qie("run", "photo.png", "bad.png", "x", "--bundle", bundle)), "bad.png is not a PNG")


# What is asked for


BAD_WISHES: dict[str, tuple[tuple[str, ...], str]] = {
    "empty instruction": (("photo.png", ""), "The instruction is empty: say in words"),
    "blank instruction": (("photo.png", " \n"), "The instruction is empty: say in words"),
    "long instruction": (("photo.png", "snow and " * 1000), r"instruction is \d+ tokens long, .* 1024: shorten it"),
    "vision token": (("photo.png", "<|image_pad|>"), "stands for an image in the prompt: remove it"),
    "vision token in negative": (("photo.png", "x", "--negative", "<|image_pad|>"), "remove it"),
    "long negative": (("photo.png", "x", "--negative", "snow and " * 1000), "shorten it"),
    "not UTF-8": (("photo.png", "make it \udcff"), "is not UTF-8 text; write it again"),
    "negative not UTF-8": (("photo.png", "x", "--negative", "\udcff"), "is not UTF-8 text; write it again"),
    "no instruction": (("photo.png", "photo.png"), "give the images first, then what to change"),
    "instruction first": (("make it red", "photo.png"), "give the images first, then what to change"),
    "one word": (("photo.png",), "give the images first, then what to change"),
    "long instruction first": (("make it red " * 40, "photo.png"), "give the images first"),
    "name too long": (("p" * 300 + ".png", "x"), "cannot be used .File name too long.; check its name"),
    "steps 0": (("photo.png", "x", "--steps", "0"), "0 steps .* at least 1: raise"),
    "steps negative": (("photo.png", "x", "--steps", "-5"), "-5 steps .* at least 1: raise"),
    "too many steps": (("photo.png", "x", "--steps", "1001"), "1001 steps were asked for, expected at most 1000"),
    "guidance nan": (("photo.png", "x", "--cfg", "nan"), "guidance scale is nan, expected a number"),
    "guidance infinite": (("photo.png", "x", "--cfg", "inf"), "guidance scale is inf, expected a number"),
    "seed too large": (("photo.png", "x", "--seed", str(2**64)), r"seed 18446744073709551616 .* from -2\*\*63 to"),
    "seed too small": (("photo.png", "x", "--seed", str(-(2**63) - 1)), r"give a whole number from -2\*\*63 to"),
    "a later seed too large": (("photo.png", "x", "--seed", str(2**64 - 1), "--num-images", "2"), "give a whole"),
    "size without x": (("photo.png", "x", "--size", "1024"), "--size is '1024', expected width x height"),
    "size of words": (("photo.png", "x", "--size", "bigxsmall"), "for example --size 1024x768"),
    "size negative": (("photo.png", "x", "--size", "-64x64"), "for example --size 1024x768"),
    "size zero": (("photo.png", "x", "--size", "0x64"), "not positive; ask for one like --size"),
    "size endless": (("photo.png", "x", "--size", "9" * 5000 + "x64"), "for example --size 1024x768"),
    "output gif": (("photo.png", "x", "-o", "out.gif"), "out.gif names no format .*; end it in one of .png, .jpg"),
    "output without suffix": (("photo.png", "x", "-o", "out"), "end it in one of .png, .jpg"),
    "output folder missing": (("photo.png", "x", "-o", "no/out.png"), "There is no folder no .*; make it or choose"),
    "output is a folder": (("photo.png", "x", "-o", "folder.png"), "it is a folder.*; choose another place"),
    "four images": (("photo.png",) * 4 + ("x",), "4 images were given, this bundle takes at most 3; leave some out"),
    "unknown bundle": (("photo.png", "x", "--bundle", "nope"), r"no bundle 'nope'.*\(known: none\).*; see `qie list`"),
    "bundle name too long": (("photo.png", "x", "--bundle", "b" * 300), "File name too long"),
}


@pytest.mark.parametrize("name", BAD_WISHES)
def test_wish(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    words, expected = BAD_WISHES[name]
    (workplace / "folder.png").mkdir()
    before = sorted(workplace.iterdir())
    with_bundle = words if "--bundle" in words else (*words, "--bundle", str(bundle))
    assert_says(refusal(qie("run", *with_bundle)), expected)
    assert sorted(workplace.iterdir()) == before


def test_bad_seeds_and_texts_cost_no_engine(
    qie: Qie, workplace: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr("qie.engines.editing.editor.load", fail)
    for words in (("x", "--seed", str(2**64)), ("",), ("x", "--steps", "0"), ("x", "--negative", "<|image_pad|>")):
        assert qie("run", "photo.png", *words, "--bundle", bundle).returncode == 2


def test_two_images_for_the_first_generation(qie: Qie, refusal: Refusal, edit_bundle: Path) -> None:
    said = refusal(qie("run", "photo.png", "photo.png", "x", "--bundle", edit_bundle))
    assert_says(said, "2 images were given, this bundle takes at most 1; leave some out")


def test_no_bundle_at_all(qie: Qie, refusal: Refusal, qie_home: Path) -> None:
    said = refusal(qie("run", "photo.png", "x"))
    assert_says(said, f"there is no bundle in {qie_home}/bundles; make one with `qie build pocket --gpu cpu`")


@pytest.mark.parametrize(
    "words", [("run", "photo.png", "x", "--steps", "abc"), ("run", "photo.png", "x", "--num-images", "0"),
              ("run", "photo.png", "x", "--frobnicate"), ("frobnicate",), ("build", "a", "b")],
    ids=" ".join,
)  # fmt: skip
def test_words_that_no_command_knows(qie: Qie, words: tuple[str, ...]) -> None:
    done = qie(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ") and "Error: " in done.stderr and "Traceback" not in done.stderr


def test_a_disk_that_is_full_when_the_image_is_written(process: Qie, refusal: Refusal, bundle: Path) -> None:
    full = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash")
    done = process("run", "photo.png", "x", *RUN, "-o", "out.png", "--bundle", bundle, before=full)
    assert_says(refusal(done), "out.png cannot be written .*; choose another place")
    assert not Path("out.png").exists()


def test_a_home_that_cannot_be_written(
    qie: Qie, workplace: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that an edit needs is lost with the cache."""
    monkeypatch.setenv("QIE_HOME", str(workplace / "photo.png" / "home"))
    assert qie("run", "photo.png", "x", "--steps", "3", "-o", "out.png", "--bundle", bundle).returncode == 0


# Bundles


def change(path: Path, **values: object) -> None:
    """Change keys of the manifest in ``path``."""
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | values))


def flip(path: Path) -> None:
    """Change a byte in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def retarget(path: Path, **values: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(path, engines=[engine | values for engine in manifest["engines"]])


AGAIN = "build (the bundle|it) again with `qie build`"
BAD_BUNDLES: dict[str, tuple[Break, str]] = {
    "weights cut short": (lambda b: cut(b / "transformer.weights"), f"transformer.weights has .* bytes, .*; {AGAIN}"),
    "weights missing": (lambda b: (b / "language.weights").unlink(), f"lacks language.weights; {AGAIN}"),
    "graph damaged": (lambda b: (b / "vision.onnx").write_bytes(
        bytes((b / "vision.onnx").stat().st_size)), f"onnxruntime .* cannot load .*vision.onnx .*; {AGAIN}"),
    "tokenizer damaged": (lambda b: (b / "tokenizer.json").write_bytes(
        b"{" * (b / "tokenizer.json").stat().st_size), f"tokenizer.json is damaged .*; {AGAIN}"),
    "manifest missing": (lambda b: (b / "manifest.json").unlink(), "there is no bundle .*; see `qie list`"),
    "manifest cut short": (lambda b: cut(b / "manifest.json"), f"manifest.json cannot be read .*; {AGAIN}"),
    "manifest of another schema": (lambda b: change(b, schema=99), f"schema 99, this qie reads schema 1; {AGAIN}"),
    "manifest with an unknown key": (lambda b: change(b, colour="red"), f"unknown key 'colour'; {AGAIN}"),
    "manifest without a key": (lambda b: change(b, engines=[{}]), rf"engines\[0\]: missing key 'component'; {AGAIN}"),
    "no engine": (lambda b: change(b, engines=[]), f"has no engine for vision; {AGAIN}"),
    "another backend": (lambda b: retarget(b, backend="abacus", compute_capability="8.9"),
        "vision is built for abacus/8.9, which .*build for this machine with `qie build --gpu cpu`"),
    "another capability": (lambda b: retarget(b, compute_capability="1.0"),
        "vision is built for onnxruntime/1.0, and this .*`qie build --gpu "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_bundle(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    break_it, expected = BAD_BUNDLES[name]
    shutil.copytree(bundle, "bad")
    break_it(Path("bad"))
    assert_says(refusal(qie("run", "photo.png", "x", *RUN, "--bundle", "bad")), expected)


@pytest.mark.parametrize("file", ["transformer.weights", "language.onnx", "modulation.weights", "tokenizer.json"])
def test_changed_bytes_are_found_by_verify(qie: Qie, refusal: Refusal, bundle: Path, file: str) -> None:
    shutil.copytree(bundle, "bad")
    flip(Path("bad", file))
    assert qie("inspect", "bad").returncode == 0
    assert_says(refusal(qie("inspect", "bad", "--verify")), f"bad/{file} is damaged; {AGAIN}")


def test_damaged_tables_are_made_again(qie: Qie, bundle: Path) -> None:
    """Tables follow from the modulation weights: those that cannot be read cost time, not the edit."""
    shutil.copytree(bundle, "bad")
    for file in Path("bad", "schedules").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    common = ("run", "photo.png", "x", "--seed", "1", "--steps", "4")
    assert qie(*common, "--bundle", "bad", "-o", "bad.png").returncode == 0
    assert qie(*common, "--bundle", bundle, "-o", "good.png").returncode == 0
    assert sha256_of(Path("bad.png")) == sha256_of(Path("good.png"))


def test_a_damaged_bundle_is_listed_and_can_be_deleted(qie: Qie, bundle: Path, qie_home: Path) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "bad")
    cut(qie_home / "bundles" / "bad" / "manifest.json")
    done = qie("list")
    assert done.returncode == 0
    assert "bad" in done.stdout and "damaged" in done.stdout and "again with `qie build`" in done.stdout
    assert json.loads(qie("list", "--json").stdout)["bundles"][0]["problem"]
    assert "again with `qie build`" in qie("doctor").stdout
    assert qie("rm", "bad", "--yes").returncode == 0
    assert not (qie_home / "bundles" / "bad").exists()


@pytest.mark.parametrize("manifest", [None, '{"name": "A web page"}', "not JSON", "[]"])
def test_rm_deletes_bundles_alone(qie: Qie, refusal: Refusal, workplace: Path, manifest: str | None) -> None:
    page = workplace / "page"
    page.mkdir()
    if manifest is not None:
        (page / "manifest.json").write_text(manifest)
    assert_says(refusal(qie("rm", page, "--yes")), "no bundle|not built by qie, so it is not deleted")
    assert page.is_dir()
    assert_says(refusal(qie("rm", "unknown", "--yes")), "there is no bundle 'unknown'")


def test_rm_without_an_answer_deletes_nothing(process: Qie, refusal: Refusal, bundle: Path, qie_home: Path) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "mine")
    closed = ("bash", "-c", 'exec "$@" </dev/null', "bash")
    assert_says(
        refusal(process("rm", "mine", before=closed)), "is not deleted: nobody answered; run `qie rm mine --yes`"
    )
    assert (qie_home / "bundles" / "mine" / "manifest.json").is_file()


# Checkpoints and recipes


def weights_of(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def without(folder: Path, part: str, name: str) -> None:
    tensors = load_file(weights_of(folder, part))
    del tensors[name]
    save_file(tensors, weights_of(folder, part))


def reshaped(folder: Path, part: str, name: str) -> None:
    tensors = load_file(weights_of(folder, part))
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, weights_of(folder, part))


def infinite(folder: Path, part: str, name: str) -> None:
    tensors = load_file(weights_of(folder, part))
    tensors[name] = np.full_like(tensors[name], np.inf)
    save_file(tensors, weights_of(folder, part))


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DOWNLOAD = "[Dd]ownload"
BAD_CHECKPOINTS: dict[str, tuple[Break, str]] = {
    "no component": (lambda c: shutil.rmtree(c / "vae"), rf"lacks vae/config.json: {DOWNLOAD}"),
    "no weights": (lambda c: weights_of(c, "vae").unlink(), f"holds no weights: .*; {DOWNLOAD}"),
    "no tokenizer": (lambda c: [shutil.rmtree(c / f) for f in ("tokenizer", "processor")], "lacks tokenizer/"),
    "no index": (lambda c: (c / "model_index.json").unlink(), "has no model_index.json: expected a checkpoint"),
    "another pipeline": (
        lambda c: edited(c / "model_index.json", _class_name="FluxPipeline"),
        "is of 'FluxPipeline'; qie compiles QwenImageEditPipeline and QwenImageEditPlusPipeline",
    ),
    "config no JSON": (lambda c: cut(c / "transformer" / "config.json"), f"is not JSON .*: {DOWNLOAD}"),
    "config with a number beyond all floats": (
        lambda c: edited(c / "scheduler" / "scheduler_config.json", shift=10**400),
        f"is not JSON .a number of 401 digits.: {DOWNLOAD}",
    ),
    "config key missing": (
        lambda c: (c / "transformer" / "config.json").write_text("{}"),
        "transformer/config.json has no 'axes_dims_rope'; download the checkpoint again or restore its config",
    ),
    "config of another kind": (
        lambda c: edited(c / "transformer" / "config.json", num_layers="two"),
        "transformer/config.json: num_layers = 'two', expected a whole number of at least 1; restore",
    ),
    "config of another model": (
        lambda c: edited(c / "transformer" / "config.json", use_layer3d_rope=True),
        "use_layer3d_rope = True is not supported",
    ),
    "configs of different models": (
        lambda c: edited(c / "transformer" / "config.json", joint_attention_dim=128),
        "text encoder is 64 wide, the transformer expects 128; they are parts of different models",
    ),
    "shard cut short": (lambda c: cut(weights_of(c, "transformer")), f"is cut short: .*{DOWNLOAD}"),
    "tensor missing": (
        lambda c: without(c, "transformer", "transformer_blocks.1.attn.to_q.weight"),
        f"tensor 'transformer_blocks.1.attn.to_q.weight' is missing.*{DOWNLOAD}",
    ),
    "tensor of another shape": (
        lambda c: reshaped(c, "transformer", "transformer_blocks.1.img_mlp.net.2.weight"),
        rf"img_mlp.net.2.weight' has shape \[256, 64\], expected \[.*{DOWNLOAD}",
    ),
    "modulation missing": (
        lambda c: without(c, "transformer", "transformer_blocks.1.img_mod.1.weight"), f"is missing.*{DOWNLOAD}"),
    "tensor not finite": (
        lambda c: infinite(c, "vae", "decoder.conv_in.bias"), f"decoder.conv_in.bias' has elements.*{DOWNLOAD}"),
    "tokenizer of another model": (
        lambda c: edited(c / "text_encoder" / "config.json", image_token_id=5),
        r"image_token_id = 5, but <\|image_pad\|> is \d+ in the tokenizer; take both from the same checkpoint",
    ),
}  # fmt: skip


@pytest.fixture
def copied(checkpoint: Path, workplace: Path) -> Path:
    """A copy of the checkpoint that may be broken."""
    shutil.copytree(checkpoint, workplace / "bad")
    return workplace / "bad"


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoint(qie: Qie, refusal: Refusal, copied: Path, qie_home: Path, name: str) -> None:
    break_it, expected = BAD_CHECKPOINTS[name]
    break_it(copied)
    assert_says(refusal(qie("build", "bad")), expected)
    assert list(qie_home.glob("bundles/*")) == []


def test_checkpoint_in_a_process_of_its_own(process: Qie, refusal: Refusal, copied: Path, qie_home: Path) -> None:
    without(copied, "vae", "decoder.conv_out.weight")
    assert_says(refusal(process("build", "bad")), "decoder.conv_out.weight' is missing")
    assert list(qie_home.glob("bundles/*")) == []


def test_truncated_shard(qie: Qie, refusal: Refusal, workplace: Path, qie_home: Path) -> None:
    folder = write_checkpoint(workplace / "bad", TINY, shard_bytes=300_000)
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    cut(shards[1])
    assert_says(refusal(qie("build", "bad")), f"{shards[1].name} is cut short: .*; {DOWNLOAD}")
    shards[1].unlink()
    assert_says(refusal(qie("build", "bad")), f"{shards[1].name} is missing: .*; {DOWNLOAD}")


def test_parts_of_different_models_are_found_before_anything_is_written(
    qie: Qie, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the build has begun")

    monkeypatch.setattr("qie.compiler.packing.pack._fill", fail)
    edited(copied / "text_encoder" / "config.json", image_token_id=5)
    assert qie("build", "bad").returncode == 2


@pytest.mark.parametrize("name", ["no/such/folder", "nope", "owner/model"])
def test_no_checkpoint(process: Qie, refusal: Refusal, name: str) -> None:
    said = refusal(process("build", name, "--dry-run"))
    assert_says(
        said, "neither a folder, nor pocket, nor a hub id such as|check the id and run `hf download owner/model`"
    )


BAD_RECIPES: dict[str, tuple[str | None, str]] = {
    "missing": (None, "cannot read the recipe mine.toml .*; check the path"),
    "no TOML": ("gpu = ", "mine.toml is not valid TOML"),
    "unknown key": ('extends = "cpu"\ncolour = "red"', "colour.*mine.toml"),
    "unknown key in a table": ('extends = "cpu"\n[shapes]\nmax_side = 5', "shapes.max_side|max_side.*mine.toml"),
    "unknown component": ('extends = "cpu"\n[components.decoder]\nprecision = "float32"', "decoder"),
    "wrong type": ('extends = "cpu"\nmemory_gib = "lots"', "memory_gib"),
    "out of range": ('extends = "cpu"\n[[schedules]]\nsteps = 0\nguidance = 4.0', "steps"),
    "extends nothing": ('extends = "nope"', 'there is no recipe "nope"'),
    "quantization": (
        'extends = "cpu"\ncompute_capability = "8.9"\n[components.transformer]\nquantization = "fp8"',
        r'quantizes transformer \("fp8"\), which needs a calibration of this model: make one with `qie calibrate`'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_recipe(qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, name: str) -> None:
    text, expected = BAD_RECIPES[name]
    if text is not None:
        Path("mine.toml").write_text(text)
    assert_says(refusal(qie("build", checkpoint, "--gpu", "mine.toml")), expected)
    assert list(qie_home.glob("bundles/*")) == []


def test_unknown_recipe(qie: Qie, refusal: Refusal, checkpoint: Path) -> None:
    assert_says(
        refusal(qie("build", checkpoint, "--gpu", "l40")), 'no recipe "l40", did you mean "l40s".* qie has a100'
    )
    assert_says(refusal(qie("recipes", "show", "nope")), 'there is no recipe "nope"; qie has a100')


def test_a_gpu_that_nothing_builds_for(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its plan can be printed all the same."""
    monkeypatch.setattr("qie.compiler.planning.plan.BUILDERS", {"onnxruntime": BUILDERS["onnxruntime"]})
    Path("small.toml").write_text('extends = "a100"\nbackends = ["tensorrt-rtx"]\n[shapes]\nmin_side = 32\n')
    said = refusal(qie("build", checkpoint, "--gpu", "small.toml"))
    assert_says(said, "the recipe small.toml builds vision for tensorrt-rtx.*use --gpu cpu, or --dry-run")
    shown = qie("build", checkpoint, "--gpu", "small.toml", "--dry-run")
    assert shown.returncode == 0
    assert "no builder" in shown.stdout
    assert list(qie_home.glob("bundles/*")) == []


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        ("transformer_blocks.7.attn.to_q", (64, 64), "changes layers that the checkpoint's transformer has not"),
        ("transformer_blocks.0.attn.to_q", (32, 64), r"as \[32, 64\], but the checkpoint has \[64, 64\]"),
    ],
)
def test_lora_of_another_model(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, layer: str, shape: tuple[int, int], expected: str
) -> None:
    down, up = np.ones((4, shape[1]), np.float32), np.ones((shape[0], 4), np.float32)
    save_file({f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}, "l.safetensors")
    assert_says(refusal(qie("build", checkpoint, "--lora", "l.safetensors:0.8")), f"{expected}.*use a LoRA made for")
    assert list(qie_home.glob("bundles/*")) == []


@pytest.mark.parametrize("content", [None, b"", b"not a LoRA at all"])
def test_a_file_that_is_no_lora(qie: Qie, refusal: Refusal, checkpoint: Path, content: bytes | None) -> None:
    if content is not None:
        Path("l.safetensors").write_bytes(content)
    assert_says(
        refusal(qie("build", checkpoint, "--lora", "l.safetensors")), "l.safetensors (cannot be read|is cut short)"
    )


# Where a build writes


def foreign(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    return folder


@pytest.mark.parametrize("command", ["build", "export"])
@pytest.mark.parametrize("out", ["thesis", ".", "photo.png", "bad", "link"])
def test_what_is_no_bundle_is_not_replaced(
    qie: Qie, refusal: Refusal, workplace: Path, copied: Path, command: str, out: str
) -> None:
    foreign(workplace / "thesis")
    (workplace / "link").symlink_to("thesis")
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    assert_says(refusal(qie(command, "bad", "--out", out)), "name another folder with --out")
    assert {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()} == before


def test_the_manifest_of_another_program_is_no_bundle(qie: Qie, refusal: Refusal, checkpoint: Path) -> None:
    page = foreign(Path("page"))
    (page / "manifest.json").write_text('{"name": "A web page"}')
    assert_says(refusal(qie("build", checkpoint, "--out", "page")), "is no bundle of qie's; name another folder")
    assert (page / "thesis.txt").is_file()


def test_an_empty_folder_and_a_bundle_are_replaced(qie: Qie, checkpoint: Path) -> None:
    Path("out").mkdir()
    for _ in range(2):
        assert qie("build", checkpoint, "--out", "out").returncode == 0
        assert qie("export", checkpoint, "--out", "graphs").returncode == 0


@pytest.mark.parametrize("name", ["../mine", "a/b", ".hidden", "", "a b"])
def test_name_of_a_bundle(qie: Qie, refusal: Refusal, checkpoint: Path, name: str) -> None:
    said = refusal(qie("build", checkpoint, "--name", name))
    assert_says(said, f"--name is {name!r}, expected letters, digits, dots and dashes; --out names a folder")


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_place_that_cannot_be_written(qie: Qie, refusal: Refusal, checkpoint: Path, command: str) -> None:
    said = refusal(qie(command, checkpoint, "--out", "photo.png/below"))
    assert_says(said, "cannot write photo.png/below .*; choose another place with --out")


# A full disk


def test_a_disk_that_is_too_small(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    said = refusal(qie("build", checkpoint))
    assert_says(said, r"needs [\d,]+ bytes, .* has 1,000 free; make room, or choose another disk with --out")
    assert list(qie_home.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "export"])
@pytest.mark.parametrize("kilobytes", [20, 400])
def test_a_disk_that_fills_up(
    process: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, command: str, kilobytes: int
) -> None:
    """The kernel refuses to make a file larger than this: graphs or weights stop in the middle."""
    full = ("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash")
    done = process(command, checkpoint, "--out", "out", before=full)
    assert_says(refusal(done), r"needs [\d,]+ bytes, and .*make room, or build elsewhere|is full, .*; make room")
    assert not Path("out").exists()


@pytest.mark.parametrize("function", ["store_tables", "write_manifest", "write_modulation"])
def test_a_disk_that_is_full_at_a_late_stage(
    qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(f"qie.compiler.packing.pack.{function}", fail)
    assert_says(
        refusal(qie("build", checkpoint)), r"is full, [\d,]+ bytes are needed; make room, or choose another disk"
    )
    assert list((qie_home / "bundles").iterdir()) == []


# A killed build


def start_and_kill(checkpoint: Path, qie_home: Path, seen: str) -> None:
    """Start a long build of the bundle "mine" and kill it when there is a file ``seen`` in its temporary folder."""
    schedules = "".join(f"[[schedules]]\nsteps = {n}\nguidance = 4.0\n" for n in range(700, 900))
    Path("long.toml").write_text(f'extends = "cpu"\n{schedules}')
    words = ["build", str(checkpoint), "--gpu", "long.toml", "--name", "mine"]
    script = "from qie.compiler.cli.app import main; main()"
    with subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.DEVNULL) as running:
        while not list(qie_home.glob(f"bundles/.mine.*.tmp/{seen}")):
            assert running.poll() is None
            time.sleep(0.002)
        running.kill()
    assert running.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("seen", ["*", "transformer.weights*", "schedules/*.npy"])
def test_killed_build(qie: Qie, refusal: Refusal, checkpoint: Path, qie_home: Path, seen: str) -> None:
    start_and_kill(checkpoint, qie_home, seen)
    (leftover,) = names(qie_home / "bundles")
    assert leftover.startswith(".mine.")
    assert qie("list").stdout.startswith("no bundles in ")
    assert json.loads(qie("doctor", "--json").stdout)["bundles"] == []
    for which in ((), ("--bundle", "mine"), ("--bundle", leftover), ("--bundle", qie_home / "bundles" / leftover)):
        assert_says(refusal(qie("run", "photo.png", "x", *which)), "there is no bundle")
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(qie_home / "bundles") == ["mine"]
    assert qie("run", "photo.png", "x", *RUN, "-o", "out.png").returncode == 0


def test_killed_rebuild_leaves_the_earlier_bundle(qie: Qie, checkpoint: Path, qie_home: Path) -> None:
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    start_and_kill(checkpoint, qie_home, "schedules/*.npy")
    listed = json.loads(qie("list", "--json").stdout)["bundles"]
    assert [(row["name"], row["problem"], row["recipe"]) for row in listed] == [("mine", None, "cpu")]
    assert qie("inspect", "mine", "--verify").returncode == 0
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(qie_home / "bundles") == ["mine"]


def test_a_build_killed_between_two_renames_is_put_back(
    qie: Qie, bundle: Path, checkpoint: Path, qie_home: Path
) -> None:
    """The earlier bundle was moved aside, the new one was not there yet."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    folder = qie_home / "bundles"
    shutil.copytree(bundle, folder / f".mine.{gone.pid}.old")
    shutil.copytree(bundle, folder / f".mine.{gone.pid}.tmp")
    before = json.loads((bundle / "manifest.json").read_text())
    assert qie("build", checkpoint, "--name", "mine").returncode == 0
    assert names(folder) == ["mine"]
    after = json.loads((folder / "mine" / "manifest.json").read_text())
    assert [e["build_seconds"] for e in after["engines"]] == [e["build_seconds"] for e in before["engines"]]


def test_a_larger_model_than_the_memory(qie: Qie, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qie.engines.bundle.bundle.open_bundle", fail)
    assert_says(refusal(qie("run", "photo.png", "x")), "not enough memory .*; use a smaller --size")


def test_the_smallest_of_everything_is_not_refused(qie: Qie, workplace: Path) -> None:
    """The counterpart of this file: limits are limits, not a step before them."""
    small = replace(TINY, num_layers=1, text_layers=1, vision_depth=1, vision_fullatt_block_indexes=())
    write_checkpoint(workplace / "small", small)
    assert qie("build", "small").returncode == 0
    Image.new("L", (1, 1)).save("dot.png")
    done = qie("run", "dot.png", "x", "--steps", "1", "--size", "32x32", "--seed", "0", "-o", "out.webp")
    assert done.returncode == 0, done.stderr
