"""Packing: what a bundle holds, what a second build keeps, and that a failed build leaves what was there."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing import pack, take_over
from qie.compiler.recipe.load import load_recipe
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import BuildError, CheckpointError
from qie.engines.files import sha256_of
from tests.support import bundles
from tests.support.images import noise_image

Build = Callable[..., Bundle]


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that may be changed."""
    return Path(shutil.copytree(checkpoint, tmp_path / "tiny"))


@pytest.fixture
def build(copied: Path, tmp_path: Path) -> Build:
    """Build ``copied`` into one and the same place, by a recipe's name or the text of a TOML file."""

    def build(recipe: str = "cpu", *, source: Path = copied, **options: Any) -> Bundle:
        return bundles.build(source, tmp_path / "out", recipe, **options)

    return build


@pytest.fixture
def before(plain_bundle: Path, tmp_path: Path) -> Bundle:
    """What the first call of ``build`` would give, in the same place; its files may be replaced."""
    return open_bundle(str(bundles.linked(plain_bundle, tmp_path / "out")))


def rebuilt(before: Bundle, stamps: dict[str, int], after: Bundle) -> set[Component]:
    """The components whose engines were made anew: other files on the disk, and another time of building."""
    made = set()
    for old, new in zip(before.manifest.engines, after.manifest.engines, strict=True):
        same_files = all(stamps[f.path] == (after.path / f.path).stat().st_ino for f in new.files)
        assert same_files == (old == new)
        if not same_files:
            made.add(new.component)
    return made


def inodes(bundle: Bundle) -> dict[str, int]:
    """Files by their inodes, which are held by links so that they are not given to other files."""
    kept = bundle.path.with_name("inodes")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    stamps = {}
    for number, record in enumerate(bundle.manifest.files()):
        (kept / str(number)).hardlink_to(bundle.path / record.path)
        stamps[record.path] = (bundle.path / record.path).stat().st_ino
    return stamps


def change_weights(folder: Path, part: str, name: str) -> None:
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    tensors[name] = tensors[name] + np.float32(0.25)
    save_file(tensors, file)


def edit(bundle: Bundle) -> np.ndarray[Any, Any]:
    request = Request(images=[noise_image(150, 90)], instructions=["make it red"], seeds=[1], steps=2)
    return np.asarray(Editor(bundle).edit(request).images[0])


# What a bundle holds


def test_a_bundle_says_what_it_is(build: Build, copied: Path) -> None:
    bundle = build()
    manifest = bundle.manifest
    recipe = load_recipe("cpu")
    assert manifest.model.name == "tiny"
    assert manifest.model.digest == open_checkpoint(str(copied)).digest()
    assert manifest.loras == ()
    assert (manifest.recipe.name, manifest.recipe.sha256) == ("cpu", recipe.digest())
    assert "steps = 20" in manifest.recipe.toml
    assert (manifest.defaults.steps, manifest.defaults.guidance) == (20, 4.0)
    assert (manifest.defaults.noise, manifest.defaults.residency) == ("float32", "resident")
    assert manifest.limits == recipe.shape_limits(128 * 128)
    assert [engine.component for engine in manifest.engines] == list(COMPONENTS)
    for engine in manifest.engines:
        assert (engine.backend, engine.compute_capability, engine.precision) == ("onnxruntime", "cpu", "float32")
        assert engine.parameters > 0
    verify(bundle)


def test_two_builds_are_equal_to_the_last_byte(build: Build, before: Bundle) -> None:
    """But for the time and memory that they took."""
    files = {record.path: record.sha256 for record in before.manifest.files()}
    shutil.rmtree(before.path)
    again = build()
    assert {record.path: record.sha256 for record in again.manifest.files()} == files


def test_the_default_schedule_is_the_first_of_the_recipe(build: Build) -> None:
    bundle = build('extends = "cpu"\nnoise = "bfloat16"\n[[schedules]]\nsteps = 6\nguidance = 2.5\n')
    defaults = bundle.manifest.defaults
    assert (defaults.steps, defaults.guidance, defaults.noise) == (6, 2.5, "bfloat16")


def test_bfloat16_checkpoints_keep_small_modulation_weights(build: Build, before: Bundle, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "narrow", ARCHITECTURES["tiny"], dtype="bfloat16", seed=1)
    wide, narrow = before.manifest.model.modulation, build(source=source).manifest.model.modulation
    assert {t.dtype for t in narrow.tensors if t.name.endswith(".weight")} == {"bfloat16"}
    assert {t.dtype for t in (*wide.tensors, *narrow.tensors) if t.name.endswith(".bias")} == {"float32"}
    assert (narrow.tables, wide.tables) == ("float32", "float32")
    assert wide.file.bytes == pytest.approx(2 * narrow.file.bytes, rel=0.05)


def test_loras_are_fused_and_recorded(build: Build, before: Bundle, copied: Path, tmp_path: Path) -> None:
    """A LoRA of attention and modulation layers gives what a checkpoint gives to which the product was added."""
    layers = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mod.1"]
    rng = np.random.default_rng(0)
    weights = next((copied / "transformer").glob("*.safetensors"))
    tensors, pairs = load_file(weights), {}
    plain = edit(before)
    for layer in layers:
        out, inner = tensors[f"{layer}.weight"].shape
        up, down = rng.normal(0, 0.3, (out, 4)).astype("f4"), rng.normal(0, 0.3, (4, inner)).astype("f4")
        pairs |= {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] + np.float32(0.5) * (up @ down)
    save_file(pairs, tmp_path / "style.safetensors")
    fused = build(loras=((tmp_path / "style.safetensors", 0.5),))
    (record,) = fused.manifest.loras
    assert (record.name, record.weight) == ("style.safetensors", 0.5)
    assert record.sha256 == sha256_of(tmp_path / "style.safetensors")
    with_lora = edit(fused)
    save_file(tensors, weights)
    assert np.abs(edit(build()).astype(int) - with_lora).max() <= 1
    assert not np.array_equal(with_lora, plain)


def test_progress_reaches_the_end_of_every_kind_of_work(build: Build) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    build(progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)))
    assert list(seen) == [
        "digest of the checkpoint",
        "weights of text_encoder",
        "weights of vae",
        "weights of transformer",
    ]
    for what, steps in seen.items():
        assert steps == sorted(steps), what
        assert len({total for _, total in steps}) == 1, what
        assert steps[-1][0] == steps[-1][1], what


# What a second build keeps


def test_nothing_changed(build: Build, before: Bundle) -> None:
    stamps = inodes(before)
    after = build()
    assert rebuilt(before, stamps, after) == set()
    verify(after)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "proj_out.bias"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "model.visual.merger.mlp.0.bias"),
    ],
)
def test_changed_weights(build: Build, before: Bundle, copied: Path, part: str, name: str) -> None:
    """The checkpoint has one digest, so every engine is made anew."""
    stamps, plain = inodes(before), edit(before)
    change_weights(copied, part, name)
    after = build()
    assert rebuilt(before, stamps, after) == set(COMPONENTS)
    assert before.manifest.model.digest != after.manifest.model.digest
    assert not np.array_equal(edit(after), plain)


def test_changed_schedules_keep_the_engines(build: Build, before: Bundle) -> None:
    stamps = inodes(before)
    after = build('extends = "cpu"\n[[schedules]]\nsteps = 6\nguidance = 2.5\n')
    assert rebuilt(before, stamps, after) == set()
    assert {f.path for f in before.manifest.schedules}.isdisjoint(f.path for f in after.manifest.schedules)
    present = {f"schedules/{path.name}" for path in (after.path / "schedules").iterdir()}
    assert present == {record.path for record in after.manifest.schedules}
    assert after.manifest.recipe.sha256 != before.manifest.recipe.sha256


def test_a_changed_section_of_the_recipe(build: Build, before: Bundle) -> None:
    stamps = inodes(before)
    after = build('extends = "cpu"\ncompute_capability = "8.9"\n')
    assert rebuilt(before, stamps, after) == set(COMPONENTS)


def test_a_lora_changes_the_transformer_alone(build: Build, before: Bundle, tmp_path: Path) -> None:
    stamps = inodes(before)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{layer}.lora_A.weight": np.ones((2, 64), "f4"), f"{layer}.lora_B.weight": np.ones((64, 2), "f4")}
    save_file(pair, tmp_path / "l.safetensors")
    after = build(loras=((tmp_path / "l.safetensors", 1.0),))
    assert rebuilt(before, stamps, after) == {"transformer"}


def test_what_decides_no_engine_changes_none(build: Build, before: Bundle) -> None:
    stamps = inodes(before)
    after = build('extends = "cpu"\ngpu = "Mine"\nresidency = "sequential"\n[limits]\nhost_memory_gib = 48\n')
    assert rebuilt(before, stamps, after) == set()
    assert after.manifest.defaults.residency == "sequential"


@pytest.mark.parametrize("change", ["factor", "content"])
def test_a_changed_lora(build: Build, tmp_path: Path, change: str) -> None:
    layer = "transformer.transformer_blocks.0.attn.to_q"
    pair = {f"{layer}.lora_A.weight": np.ones((2, 64), "f4"), f"{layer}.lora_B.weight": np.ones((64, 2), "f4")}
    save_file(pair, tmp_path / "l.safetensors")
    before = build(loras=((tmp_path / "l.safetensors", 1.0),))
    stamps = inodes(before)
    assert rebuilt(before, stamps, build(loras=((tmp_path / "l.safetensors", 1.0),))) == set()
    if change == "content":
        save_file({name: tensor * np.float32(2) for name, tensor in pair.items()}, tmp_path / "l.safetensors")
    factor = 0.5 if change == "factor" else 1.0
    assert rebuilt(before, stamps, build(loras=((tmp_path / "l.safetensors", factor),))) == {"transformer"}


def test_another_version_of_a_tool(build: Build, before: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = inodes(before)
    monkeypatch.setattr("onnxscript.__version__", "0.0.0")
    assert rebuilt(before, stamps, build()) == set(COMPONENTS)


def test_another_graph_of_the_same_weights(build: Build, before: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = inodes(before)
    monkeypatch.setattr("qie.compiler.graphs.graph.IR_VERSION", 10)
    assert rebuilt(before, stamps, build()) == set(COMPONENTS)


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing"])
def test_a_damaged_engine_is_not_kept(build: Build, before: Bundle, damage: str) -> None:
    expected = edit(before)
    file = before.path / "transformer.weights"
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "changed":
        content[5000] ^= 0xFF
        file.write_bytes(content)
    elif damage == "cut short":
        file.write_bytes(content[:5000])
    after = build()
    verify(after)
    engines = {e.component: e for e in before.manifest.engines}, {e.component: e for e in after.manifest.engines}
    assert engines[0]["transformer"].files[1].sha256 == engines[1]["transformer"].files[1].sha256
    assert np.array_equal(edit(after), expected)
    if damage == "changed":
        assert engines[0]["vision"] == engines[1]["vision"]


def test_a_damaged_manifest_is_built_over(build: Build, qie_home: Path, copied: Path) -> None:
    destination = qie_home / "bundles" / "mine"
    bundles.build(copied, destination)
    (destination / "manifest.json").write_text("{")
    verify(bundles.build(copied, destination))


def test_files_are_copied_where_they_cannot_be_linked(
    build: Build, before: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail(*_: object, **__: object) -> None:
        raise OSError(18, "cross-device link")

    monkeypatch.setattr(take_over.os, "link", fail)
    after = build()
    assert after.manifest.engines == before.manifest.engines
    verify(after)


# What a failed build leaves


@pytest.mark.parametrize(
    "problem", [OSError(28, "no room"), OSError(30, "read-only"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("earlier", [True, False])
def test_a_failed_build_leaves_what_was_there(
    build: Build,
    plain_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: BaseException,
    earlier: bool,
) -> None:
    before = open_bundle(str(bundles.linked(plain_bundle, tmp_path / "out"))) if earlier else None

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(pack, "write_manifest", fail)
    with pytest.raises(BuildError if isinstance(problem, OSError) else type(problem)):
        build('extends = "cpu"\n[[schedules]]\nsteps = 6\nguidance = 2.5\n')
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "out").exists() == earlier
    if before is not None:
        verify(open_bundle(str(before.path)))
        assert open_bundle(str(before.path)).manifest == before.manifest


def test_weights_that_break_in_the_middle_leave_nothing(build: Build, copied: Path, tmp_path: Path) -> None:
    file = next((copied / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] = np.full_like(tensors["decoder.conv_out.bias"], np.nan)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias"):
        build()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_the_manifest_is_the_last_file(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it lists is on the disk before it is."""
    real = pack.write_manifest

    def write(manifest: Any, folder: Path) -> None:
        for record in manifest.files():
            assert sha256_of(folder / record.path) == record.sha256
        assert (folder / "manifest.json").read_text() == ""  # the lock of the folder
        real(manifest, folder)

    monkeypatch.setattr(pack, "write_manifest", write)
    bundle = build()
    assert json.loads((bundle.path / "manifest.json").read_text())["schema"] == 4


def test_a_larger_batch_than_the_recipe_allows_is_split(build: Build) -> None:
    bundle = build('extends = "cpu"\n[shapes]\nbatch = { min = 1, opt = 1, max = 2 }\n')
    assert bundle.manifest.limits.batch_max == 2
    image = Image.new("RGB", (90, 90))
    request = Request(images=[image], instructions=["make it red"], seeds=[1, 2, 3], steps=1, guidance=1.0)
    together = Editor(bundle).edit(request)
    alone = Editor(bundle).edit(replace(request, seeds=[3]))
    assert np.array_equal(together.images[2], alone.images[0])
