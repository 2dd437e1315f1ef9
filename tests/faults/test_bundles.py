"""Bundles that are damaged, incomplete or built for another machine."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import RUN, Qie, Refusal, assert_says
from tests.support.damage import Break, change_json, change_manifest, cut, flip


def retarget(bundle: Path, **values: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change_manifest(bundle, engines=[engine | values for engine in manifest["engines"]])


AGAIN = "build (the bundle|it) again with `qie build`"
BAD_BUNDLES: dict[str, tuple[Break, str]] = {
    "weights cut short": (lambda b: cut(b / "transformer.weights"), f"transformer.weights has .* bytes, .*; {AGAIN}"),
    "weights missing": (lambda b: (b / "language.weights").unlink(), f"lacks language.weights; {AGAIN}"),
    "graph damaged": (lambda b: (b / "vision.onnx").write_bytes(
        bytes((b / "vision.onnx").stat().st_size)), f"vision.onnx is damaged; {AGAIN}"),
    "tokenizer damaged": (lambda b: (b / "tokenizer.json").write_bytes(
        b"{" * (b / "tokenizer.json").stat().st_size), f"tokenizer.json is damaged; {AGAIN}"),
    "manifest missing": (lambda b: (b / "manifest.json").unlink(), "there is no bundle .*; choose one of `qie list`"),
    "manifest cut short": (lambda b: cut(b / "manifest.json"), f"manifest.json cannot be read .*; {AGAIN}"),
    "manifest of another schema": (lambda b: change_manifest(b, schema=99),
        f"schema 99, expected 3 or 4; {AGAIN}"),
    "manifest changed": (lambda b: change_json(b / "manifest.json", qie="9.9"),
        f"manifest.json is damaged, its digest is another; {AGAIN}"),
    "manifest with an unknown key": (lambda b: change_manifest(b, colour="red"),
        f"unknown key 'colour'; {AGAIN}"),
    "manifest without a key": (lambda b: change_manifest(b, engines=[{}]),
        rf"engines\[0\]: missing key 'component'; {AGAIN}"),
    "no engine": (lambda b: change_manifest(b, engines=[]), f"has no engine for vision; {AGAIN}"),
    "another backend": (lambda b: retarget(b, backend="abacus", compute_capability="8.9"),
        "vision is built for abacus/8.9, which .*; build for this machine with the recipe cpu"),
    "another capability": (lambda b: retarget(b, compute_capability="1.0"),
        "vision is built for onnxruntime/1.0, and .*; .*build for this machine with the recipe cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_bundle(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    break_it, expected = BAD_BUNDLES[name]
    shutil.copytree(bundle, "bad")
    break_it(Path("bad"))
    assert_says(refusal(qie("run", "photo.png", "x", *RUN, "--bundle", "bad")), expected)


@pytest.mark.parametrize("file", ["transformer.weights", "modulation.weights"])
def test_changed_bytes_are_found_by_verify(qie: Qie, refusal: Refusal, bundle: Path, file: str) -> None:
    shutil.copytree(bundle, "bad")
    flip(Path("bad", file))
    assert qie("inspect", "bad").returncode == 0
    assert_says(refusal(qie("inspect", "bad", "--verify")), f"bad/{file} is damaged; {AGAIN}")


@pytest.mark.parametrize("file", ["language.onnx", "tokenizer.json", "manifest.json"])
def test_changed_bytes_of_small_files_are_found_by_every_opening(
    qie: Qie, refusal: Refusal, bundle: Path, file: str
) -> None:
    shutil.copytree(bundle, "bad")
    flip(Path("bad", file))
    for words in (("inspect", "bad"), ("run", "photo.png", "x", "--bundle", "bad")):
        assert_says(refusal(qie(*words)), f"bad/{file} (is damaged|cannot be read).*; {AGAIN}")


def test_damaged_tables_are_made_again(qie: Qie, bundle: Path) -> None:
    """Tables follow from the modulation weights: those that cannot be read cost time, not the edit."""
    shutil.copytree(bundle, "bad")
    for file in Path("bad", "schedules").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    common = ("run", "photo.png", "x", "--seed", "1", "--steps", "4")
    assert qie(*common, "--bundle", "bad", "-o", "bad.png").returncode == 0
    assert qie(*common, "--bundle", bundle, "-o", "good.png").returncode == 0
    bad, good = (np.asarray(Image.open(name)).astype(int) for name in ("bad.png", "good.png"))
    assert np.abs(bad - good).max() <= 1  # a build multiplies all timesteps together: another order of sums


def test_a_damaged_bundle_is_listed_and_can_be_deleted(qie: Qie, bundle: Path, qie_home: Path) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "bad")
    cut(qie_home / "bundles" / "bad" / "manifest.json")
    done = qie("list")
    assert done.returncode == 0
    assert re.search(r"^bad +damaged .*\n +.*manifest.json cannot be read", done.stdout, re.MULTILINE), done.stdout
    assert "again with `qie build`" in " ".join(done.stdout.split())
    assert json.loads(qie("list", "--json").stdout)["bundles"][0]["problem"]
    assert "again with `qie build`" in " ".join(qie("doctor").stdout.split())
    assert qie("rm", "bad", "--yes").returncode == 0
    assert not (qie_home / "bundles" / "bad").exists()


def test_bad_bundles_do_not_hide_the_good_one(qie: Qie, bundle: Path, workplace: Path, qie_home: Path) -> None:
    folder = qie_home / "bundles"
    model = json.loads((bundle / "manifest.json").read_text())["model"]
    for name in ("good", "huge", "long", "deep", "binary", "empty"):
        shutil.copytree(bundle, folder / name)
        os.utime(folder / name / "manifest.json", (0 if name == "good" else 100, 0 if name == "good" else 100))
    change_manifest(folder / "huge", model=model | {"scheduler": model["scheduler"] | {"shift": 10**400}})
    change_manifest(folder / "long", tokenizer={"path": "x" * 300, "bytes": 1, "sha256": "0" * 64})
    (folder / "deep" / "manifest.json").write_text("[" * 100_000)
    (folder / "binary" / "manifest.json").write_bytes(bytes(range(256)))
    (folder / "empty" / "manifest.json").write_bytes(b"")
    listed = json.loads(qie("list", "--json").stdout)["bundles"]
    assert {row["name"]: row["problem"] is None for row in listed} == {
        "good": True, "huge": False, "long": False, "deep": False, "binary": False, "empty": False
    }  # fmt: skip
    assert qie("list").returncode == qie("doctor").returncode == 0
    done = qie("run", "photo.png", "x", *RUN, "--json", "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == str(folder / "good")


@pytest.mark.parametrize("manifest", [None, '{"name": "A web page"}', "not JSON", "[]"])
def test_rm_deletes_bundles_alone(qie: Qie, refusal: Refusal, workplace: Path, manifest: str | None) -> None:
    page = workplace / "page"
    page.mkdir()
    if manifest is not None:
        (page / "manifest.json").write_text(manifest)
    assert_says(refusal(qie("rm", page, "--yes")), "no bundle|not built by qie and is not deleted")
    assert page.is_dir()
    assert_says(refusal(qie("rm", "unknown", "--yes")), "there is no bundle 'unknown'")


def test_rm_without_an_answer_deletes_nothing(process: Qie, refusal: Refusal, bundle: Path, qie_home: Path) -> None:
    shutil.copytree(bundle, qie_home / "bundles" / "mine")
    closed = ("bash", "-c", 'exec "$@" </dev/null', "bash")
    assert_says(
        refusal(process("rm", "mine", before=closed)), "is not deleted, since nobody answered; run `qie rm mine --yes`"
    )
    assert (qie_home / "bundles" / "mine" / "manifest.json").is_file()
