"""``qie diff``: sections with what differs, names, exit codes, and JSON."""

import json
from pathlib import Path

import pytest

from qie.compiler.validation.golden import match
from qie.compiler.validation.golden.file import GOLDEN_FILE
from qie.engines.bundle.bundle import open_bundle
from tests.support.bundles import build, linked
from tests.support.command_line import Qie, Refusal, assert_says
from tests.support.damage import change_manifest
from tests.support.golden_cases import write_own_golden

RECIPE = 'extends = "cpu"\n[components.transformer]\nscheme = "w8a16"\n'


@pytest.fixture(scope="module")
def pair(pocket_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pocket model for the CPU, in float32 and in w8a16."""
    folder = tmp_path_factory.mktemp("pair")
    return linked(pocket_bundle, folder / "plain"), build("pocket", folder / "quantized", RECIPE).path


@pytest.fixture(autouse=True)
def beside_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of the pocket model's golden file, which is not there."""
    folder = tmp_path_factory.mktemp("recipes") / "pocket"
    folder.mkdir()
    monkeypatch.setattr(match, "POCKET", folder)
    return folder / GOLDEN_FILE


def test_sections_show_what_differs_alone(qie: Qie, pair: tuple[Path, Path]) -> None:
    done = qie("diff", *pair)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("old: plain\nnew: quantized\n\nrecipe:\n")
    assert_says(done.stdout, r"components\.transformer\.scheme +none +w8a16")
    assert_says(done.stdout, r"transformer \(onnxruntime/cpu\):\n")
    assert_says(done.stdout, r"DequantizeLinear +0 +56\n")
    assert_says(
        done.stdout, r"transformer_blocks\.\{0-4\}\.img_mlp\.net\.2\.weight +float32 768x192 +int8 768x192 +5 +0.011"
    )
    assert_says(done.stdout, r"no difference: qie, model, LoRAs, defaults and limits, modulation weights, vision ")
    assert_says(done.stdout, "velocity: not compared")
    assert str(pair[0].parent) not in done.stdout


def test_a_bundle_and_itself(qie: Qie, pair: tuple[Path, Path]) -> None:
    done = qie("diff", pair[0], pair[0], "--exit-code")
    assert done.returncode == 0
    assert done.stdout.endswith("\n\nno difference\n")


def test_the_exit_code_tells_of_a_difference(qie: Qie, pair: tuple[Path, Path]) -> None:
    assert qie("diff", *pair, "--exit-code").returncode == 1
    assert qie("diff", *pair).returncode == 0


def test_another_build_is_no_difference(qie: Qie, pair: tuple[Path, Path], tmp_path: Path) -> None:
    again = build("pocket", tmp_path / "again").path
    done = qie("diff", pair[0], again, "--exit-code")
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("no difference, except in time and memory of the build\n")
    assert_says(done.stdout, r"transformer +seconds +\d+ ms +\d+ ms")


def test_another_model_is_told_first(qie: Qie, pair: tuple[Path, Path], bundle: Path) -> None:
    done = qie("diff", pair[0], bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The bundles are of different models: pocket and tiny.\n")


def test_velocities_of_each_step(qie: Qie, pair: tuple[Path, Path], tmp_path: Path) -> None:
    golden = write_own_golden(open_bundle(pair[0]), tmp_path / "mine.safetensors", recorded=(0, 2), guidance=1.0)
    done = qie("diff", *pair, "--golden", golden)
    assert done.returncode == 0, done.stderr
    assert_says(done.stdout, r"red +1 +1\.000 +conditional +0\.0\d+ +0 +0\.0\d+\n")
    assert_says(done.stdout, r"red +3 +0\.\d+ +conditional")
    assert "relative L2 along the trajectory of mine.safetensors" in done.stdout
    same = qie("diff", pair[0], pair[0], "--golden", golden, "--exit-code")
    assert (same.returncode, same.stdout) == (0, "old: plain\nnew: plain\n\nno difference\n")


def test_the_golden_file_beside_the_checkpoint_is_found(
    qie: Qie, pair: tuple[Path, Path], bundle: Path, beside_checkpoint: Path
) -> None:
    write_own_golden(open_bundle(pair[0]), beside_checkpoint, recorded=(3,), guidance=1.0)
    found = json.loads(qie("diff", *pair, "--json").stdout)["velocity"]
    assert (found["golden"], found["not_run"], [s["step"] for s in found["steps"]]) == (GOLDEN_FILE, None, [3])
    other = json.loads(qie("diff", bundle, bundle, "--json").stdout)["velocity"]
    assert (other["golden"], other["steps"]) == (None, [])
    write_own_golden(open_bundle(bundle), beside_checkpoint, recorded=(3,), guidance=1.0)
    assert json.loads(qie("diff", *pair, "--json").stdout)["velocity"]["golden"] is None  # of other weights


def test_json_has_everything(qie: Qie, pair: tuple[Path, Path]) -> None:
    done = qie("diff", *pair, "--json", "--exit-code")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["differs"] is True
    assert found["recipe"] == [{"key": "components.transformer.scheme", "old": "none", "new": "w8a16"}]
    engine = next(engine for engine in found["engines"] if engine["component"] == "transformer")
    assert len(engine["graph"]["weights"]) == 56
    assert found["velocity"]["steps"] == []


def test_what_is_no_bundle_is_refused(qie: Qie, refusal: Refusal, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert_says(refusal(qie("diff", pair[0], "absent")), "there is no bundle 'absent'")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    refusal(qie("diff", broken, pair[0]))
    assert_says(refusal(qie("diff", *pair, "--golden", tmp_path / "x")), "the golden file .* cannot be read")


def test_hostile_text_cannot_control_the_terminal(qie: Qie, pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = linked(pair[0], tmp_path / "copy")
    recipe = json.loads((copy / "manifest.json").read_text())["recipe"]
    change_manifest(copy, recipe=recipe | {"toml": recipe["toml"].replace('gpu = "', 'gpu = "\\u001b[2J')})
    done = qie("diff", pair[0], copy)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "components.transformer" not in done.stdout
