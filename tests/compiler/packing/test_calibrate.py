"""A build that needs a calibration makes one, keeps it, and finds it again."""

import fcntl
import json
import shutil
import threading
from pathlib import Path

import pytest

from qie.compiler.packing import calibrate as module
from qie.compiler.packing.build import build
from qie.compiler.packing.calibrate import calibrated
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.resolve import plan_build
from qie.compiler.quantization.schemes import SCHEMES
from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.engines.bundle.clean import remove, unneeded
from qie.engines.errors import BuildError, CalibrationError
from tests.support.command_line import Qie, Refusal
from tests.support.images import smooth_image

RECIPE = 'extends = "cpu"\n[components]\ntransformer = { precision = "float32", scheme = "SCHEME" }\n'


def recipe(folder: Path, scheme: str = "fp8") -> Path:
    path = folder / f"{scheme}.toml"
    path.write_text(RECIPE.replace("SCHEME", scheme))
    return path


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(module, "SAMPLES", 1)
    planned = plan_build(checkpoint, gpu=recipe(tmp_path), out=tmp_path / "bundle")
    assert planned.calibration is None
    return planned


def kept(home: Path) -> list[str]:
    return sorted(path.suffix for path in (home / "calibrations").iterdir())


def test_a_build_calibrates_once(plan: Plan, qie_home: Path) -> None:
    stages: list[str] = []
    first = build(plan, progress=lambda what, done, total: stages.append(what))
    assert list(dict.fromkeys(stages))[:5] == [
        "digest of the checkpoint", "vision", "language", "vae_encoder", "transformer",
    ]  # fmt: skip
    assert kept(qie_home) == [".npz"]
    stages.clear()
    again = calibrated(plan, progress=lambda what, done, total: stages.append(what))
    assert set(stages) == {"digest of the checkpoint"}
    assert again.calibration is not None
    assert again.calibration.sha256 == first.manifest.calibration.sha256  # type: ignore[union-attr]
    assert again.calibration.smoothing_scales == {}
    assert (again.destination, again.recipe_name) == (plan.destination, plan.recipe_name)
    assert again.components[3].amax.values() != plan.components[3].amax.values()
    assert calibrated(again) is again

    (npz,) = (qie_home / "calibrations").glob("*.npz")
    content = npz.read_bytes()
    npz.write_bytes(content[:-9])  # a damaged one is made again
    assert calibrated(plan).calibration is not None
    assert npz.read_bytes() == content


def test_what_is_measured_depends_on_recipe_and_images(
    plan: Plan, checkpoint: Path, tmp_path: Path, qie_home: Path
) -> None:
    smoothed = calibrated(plan_build(checkpoint, gpu=recipe(tmp_path, "int8-smooth"), out=tmp_path / "b"))
    assert smoothed.calibration is not None
    assert set(smoothed.calibration.smoothing_scales) == {"int8-smooth"}
    (tmp_path / "mine").mkdir()
    smooth_image(90, 60).save(tmp_path / "mine" / "one.png")
    made = calibrated(plan, images=tmp_path / "mine")
    assert made.calibration is not None
    assert made.calibration.data != smoothed.calibration.data
    other = calibrated(smoothed, images=tmp_path / "mine")  # the plan has one, and images ask for another
    assert other.calibration is not None
    assert other.calibration.data == made.calibration.data
    assert len(kept(qie_home)) == 3
    plain = plan_build(checkpoint, out=tmp_path / "b")
    assert calibrated(plain) is plain


def test_a_stopped_calibration_goes_on(plan: Plan, qie_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("language", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(plan, progress=stop)
    assert kept(qie_home) == [".partial"]
    stages: list[tuple[str, int]] = []
    done = calibrated(plan, progress=lambda what, done, total: stages.append((what, done)))
    assert [stage for stage in stages if stage[0] in ("vision", "language")] == [("language", 3)]
    assert kept(qie_home) == [".npz"]
    (npz,) = (qie_home / "calibrations").glob("*.npz")
    resumed = npz.read_bytes()
    npz.unlink()
    calibrated(plan)
    assert npz.read_bytes() == resumed
    assert done.calibration is not None


def test_two_builds_at_once_make_one(plan: Plan, qie_home: Path) -> None:
    """The second waits for what the first holds, and takes its result."""
    calibrated(plan)
    (npz,) = (qie_home / "calibrations").glob("*.npz")
    content = npz.read_bytes()
    npz.unlink()
    folder = npz.with_suffix(".partial")
    folder.mkdir()
    results: list[Plan] = []
    stages: list[str] = []
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert not any(item.path == folder for item in unneeded())
        thread = threading.Thread(
            target=lambda: results.append(calibrated(plan, progress=lambda what, done, total: stages.append(what)))
        )
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        npz.write_bytes(content)
    thread.join(30)
    assert results[0].calibration is not None
    assert set(stages) <= {"digest of the checkpoint", module.WAITING}
    assert stages.count(module.WAITING) == 2  # when it begins and when it ends
    assert kept(qie_home) == [".npz"]


def test_a_home_that_vanishes_while_a_calibration_is_made(plan: Plan, qie_home: Path) -> None:
    def vanish(what: str, done: int, total: int) -> None:
        if (what, done) == ("language", 2):
            shutil.rmtree(qie_home / "calibrations")

    assert calibrated(plan, progress=vanish).calibration is not None
    assert kept(qie_home) == [".npz"]


def test_a_home_that_vanishes_while_a_build_waits(plan: Plan, qie_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[bool] = []

    def held_by_another(descriptor: int, *, exclusive: bool) -> bool:
        attempts.append(exclusive)
        if len(attempts) == 1:
            shutil.rmtree(qie_home / "calibrations")
        return len(attempts) > 1

    monkeypatch.setattr(module, "try_lock", held_by_another)
    assert calibrated(plan).calibration is not None
    assert len(attempts) == 2


@pytest.mark.parametrize(("changed", "to"), [("version_of", "9.9"), ("providers", ["OtherExecutionProvider"])])
def test_other_tools_make_another(
    plan: Plan, qie_home: Path, monkeypatch: pytest.MonkeyPatch, changed: str, to: object
) -> None:
    calibrated(plan)
    monkeypatch.setattr(module, changed, lambda *package: to)
    calibrated(plan)
    assert kept(qie_home) == [".npz", ".npz"]


def test_a_home_that_cannot_be_written(plan: Plan, qie_home: Path) -> None:
    (qie_home / "calibrations").write_text("a file")
    with pytest.raises(CalibrationError, match=r"cannot be kept in .*calibrations .*; set QIE_HOME to"):
        calibrated(plan)


def test_clean_lists_what_is_kept_and_what_was_left(plan: Plan, qie_home: Path) -> None:
    calibrated(plan)
    left = qie_home / "calibrations" / "0.partial"
    left.mkdir()
    (left / ".lock").touch()
    (left / "reached").mkdir()
    (left / "reached" / "state").write_bytes(b"half")
    listed = [item.what for item in unneeded()]
    assert "left by a stopped calibration" in listed
    assert "a calibration that a build made" not in listed
    items = {item.what: item for item in unneeded(calibrations=True)}
    assert {"a calibration that a build made", "left by a stopped calibration"} <= items.keys()
    assert all(remove(item) for item in items.values())
    assert kept(qie_home) == []


# The command line


def test_the_plan_says_it(qie: Qie, checkpoint: Path, tmp_path: Path) -> None:
    text = " ".join(qie("build", checkpoint, "--gpu", recipe(tmp_path), "--dry-run").stdout.split())
    assert "calibration: 8 samples of the built-in images at 128x128, a few seconds on" in text
    assert "MiB of host memory; an earlier build's" in text
    facts = json.loads(qie("build", checkpoint, "--gpu", recipe(tmp_path), "--dry-run", "--json").stdout)
    assert (facts["calibration"]["samples"], facts["calibration"]["width"]) == (8, 128)
    assert "calibration: 8 samples" in qie("plan", checkpoint, "--gpu", recipe(tmp_path)).stdout
    assert "calibration" not in qie("build", checkpoint, "--dry-run").stdout
    assert json.loads(qie("plan", "pocket", "--gpu", "cpu", "--json").stdout)["calibration"] is None
    assert "pocket/calibration.npz" in qie("build", "pocket", "--gpu", recipe(tmp_path), "--dry-run").stdout


def test_a_calibration_that_does_not_fit_is_refused(
    qie: Qie, refusal: Refusal, checkpoint: Path, tmp_path: Path, qie_home: Path
) -> None:
    quantizing = ("build", checkpoint, "--gpu", recipe(tmp_path), "--memory-gib", "0.25")
    assert "of host memory (0.66 GiB for the process + " in refusal(qie(*quantizing))
    assert not (qie_home / "calibrations").exists()
    assert "and the build may use 0.25 GiB" in refusal(qie("plan", *quantizing[1:]))
    (tmp_path / "mine").mkdir()
    smooth_image(90, 60).save(tmp_path / "mine" / "one.png")
    pocket = plan_build("pocket", gpu=recipe(tmp_path), memory_gib=0.25)  # which has a calibration of its own
    assert module.for_images(pocket, None) is pocket
    assert module.for_images(pocket, tmp_path / "mine").calibration is None
    with pytest.raises(BuildError, match="calibrating .* takes about"):
        build(pocket, images=tmp_path / "mine")


def test_a_dry_run_says_what_the_build_does(
    qie: Qie, refusal: Refusal, checkpoint: Path, tmp_path: Path, qie_home: Path
) -> None:
    (tmp_path / "mine").mkdir()
    smooth_image(90, 60).save(tmp_path / "mine" / "one.png")
    dry = ("build", "pocket", "--gpu", recipe(tmp_path), "--images", tmp_path / "mine", "--dry-run")
    said = " ".join(qie(*dry).stdout.split())
    assert f"calibration: 8 samples of {tmp_path / 'mine'} at " in said and "calibration.npz" not in said
    assert "and the build may use 0.25 GiB" in refusal(qie(*dry, "--memory-gib", "0.25"))
    on_demand = synthesize(plan_synthesis("tiny", tmp_path / "tiny", on_demand=True))
    assert "stream them" in refusal(qie("build", on_demand, "--dry-run"))
    assert qie("build", on_demand, "--dry-run", "--stream").returncode == 0
    assert not (qie_home / "calibrations").exists()


def test_images_that_cannot_be_used(qie: Qie, refusal: Refusal, checkpoint: Path, tmp_path: Path) -> None:
    quantizing = ("build", checkpoint, "--gpu", recipe(tmp_path), "--images")
    assert "there is no folder" in refusal(qie(*quantizing, tmp_path / "none"))
    (tmp_path / "none").mkdir()
    assert "has no images" in refusal(qie(*quantizing, tmp_path / "none"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    assert "a.png" in refusal(qie(*quantizing, tmp_path / "broken"))
    both = refusal(qie(*quantizing, tmp_path / "broken", "--calibration", "pocket.npz"))
    assert "cannot read the calibration" in both
    assert "does not quantize" in refusal(qie("build", checkpoint, "--images", tmp_path))


def test_images_and_a_calibration(plan: Plan, tmp_path: Path) -> None:
    done = calibrated(plan)
    assert done.calibration is not None
    file = tmp_path / "c.npz"
    shutil.copy(str(done.calibration.source), file)
    with pytest.raises(CalibrationError, match="give one of the two"):
        build(plan.checkpoint.path, gpu=recipe(tmp_path), calibration=file, images=tmp_path, out=tmp_path / "b")


def test_the_built_in_images() -> None:
    files = sorted(path.name for path in module.IMAGES.iterdir())
    text = (module.IMAGES / "README.md").read_text()
    images = [name for name in files if name.endswith(".jpg")]
    assert len(images) == 8
    assert [*images, "README.md"] == sorted(files, key=lambda name: (name == "README.md", name))
    assert all(f"| `{name}` |" in text for name in images)
    assert sum((module.IMAGES / name).stat().st_size for name in images) < 500_000


def test_the_area_of_samples() -> None:
    model = plan_build("pocket").model
    assert module.calibration_model(model, 448 * 448).areas.vae_area == 128 * 128
    sides = {scheme: module.calibration_area(scheme) ** 0.5 for scheme in SCHEMES}
    assert sides == {"fp8": 384, "int8-smooth": 448, "w8a16": 384, "w4a16": 384}
