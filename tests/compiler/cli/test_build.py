"""``qie build``: what it writes, what it prints, and that an interrupted build leaves nothing."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS
from tests.support.command_line import RUN, Qie, pixels


def test_build_then_edit(qie: Qie, workplace: Path, checkpoint: Path, qie_home: Path) -> None:
    done = qie("build", checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tiny (edit_plus), recipe cpu, LoRAs: none" in done.stdout
    for component in COMPONENTS:
        assert re.search(rf"^{component} +onnxruntime +float32 ", done.stdout, re.MULTILINE)
    assert done.stdout.index("component") < done.stdout.index("edit with: qie run")
    assert (qie_home / "bundles" / "tiny-cpu" / "manifest.json").is_file()
    assert {path.name for path in (qie_home / "bundles").iterdir()} == {"tiny-cpu"}

    edited = qie("run", "photo.png", "make it red", *RUN)
    assert edited.stdout == "photo-edited.png\n"
    assert pixels("photo-edited.png").shape == (96, 160, 3)


def test_what_build_says_at_last_can_be_run(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    done = qie("build", checkpoint, "--out", "here")
    words = re.search(r'edit with: qie run photo.png "(.*)" (--bundle \S+)', done.stdout)
    assert words is not None
    assert qie("run", "photo.png", words[1], *words[2].split(), *RUN).returncode == 0


def test_build_as_json(qie: Qie, workplace: Path, checkpoint: Path, qie_home: Path) -> None:
    answer = json.loads(qie("build", checkpoint, "--name", "other", "--json").stdout)
    path = qie_home / "bundles" / "other"
    assert (answer["bundle"], answer["name"]) == (str(path), "other")
    files = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != "manifest.json")
    assert answer["bytes"] == files


def test_dry_run_prints_the_plan_and_writes_nothing(
    qie: Qie, workplace: Path, checkpoint: Path, qie_home: Path
) -> None:
    text = qie("build", checkpoint, "--dry-run")
    assert text.returncode == 0
    assert "vae_decoder" in text.stdout
    plan = json.loads(qie("build", checkpoint, "--dry-run", "--json").stdout)
    assert set(plan) >= {"model", "revision", "pipeline", "recipe", "destination", "bytes", "components"}
    assert [part["component"] for part in plan["components"]] == list(COMPONENTS)
    assert all(part["backend"] == "onnxruntime" for part in plan["components"])
    assert plan["bytes"] > sum(part["bytes"] for part in plan["components"]) > 0
    assert list(qie_home.iterdir()) == []


def test_dry_run_for_a_gpu_that_is_not_here(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    fp8 = '[components.transformer]\nscheme = "fp8"\nexclude = []\nattention = "fp8"\n'
    Path("small.toml").write_text(f'extends = "h100"\n[shapes]\nmin_side = 32\n{fp8}')
    plan = json.loads(qie("build", checkpoint, "--gpu", "small.toml", "--dry-run", "--json").stdout)
    transformer = next(part for part in plan["components"] if part["component"] == "transformer")
    assert [transformer[key] for key in ("precision", "scheme", "attention")] == ["bfloat16", "fp8", "fp8"]
    assert "bfloat16, fp8, fp8 attention" in qie("build", checkpoint, "--gpu", "small.toml", "--dry-run").stdout


def test_dry_run_needs_no_weights(qie: Qie, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bare", ARCHITECTURES["tiny"], weights=False)
    assert qie("build", folder, "--dry-run").returncode == 0


def test_an_interrupted_build_leaves_nothing(workplace: Path, checkpoint: Path, qie_home: Path) -> None:
    long = 'extends = "cpu"\n' + "".join(f"[[schedules]]\nsteps = {n}\nguidance = 4.0\n" for n in range(700, 900))
    Path("long.toml").write_text(long)
    # A background job of a shell ignores SIGINT, and so would what the tests start if they run as one.
    attentive = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script = attentive + "from qie.compiler.cli.main import main; main()"
    words = ["build", str(checkpoint), "--gpu", "long.toml", "--name", "long"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        while not list(qie_home.glob("bundles/.long.*/*/schedules/*")):
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130
    assert "Traceback" not in err
    assert list((qie_home / "bundles").iterdir()) == []
