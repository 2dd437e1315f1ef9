"""The command line where everything is right: what it writes, what it prints and where, what it imports."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

import qie as package
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS

Qie = Callable[..., CompletedProcess[str]]
RUN = ("--steps", "2", "--cfg", "1")

HEAVY = (
    "accelerate", "diffusers", "huggingface_hub", "ml_dtypes", "onnx", "onnx_ir", "onnxscript", "polygraphy",
    "safetensors", "torch", "transformers",
)  # fmt: skip
RUNTIME = ("numpy", "onnxruntime", "PIL", "tokenizers")

WATCHED = """
import sys
blocked, watched, *words = sys.argv[1:]
sys.modules.update(dict.fromkeys(filter(None, blocked.split(","))))
sys.argv = ["qie", *words]
from qie.compiler.cli.app import main
try:
    main()
finally:
    print("LOADED", *(name for name in watched.split(",") if sys.modules.get(name)))
"""
"""Runs a command where the packages ``blocked`` seem not to be installed, then tells which of ``watched`` it loaded."""


def watched(*words: str | Path, blocked: tuple[str, ...] = (), watch: tuple[str, ...] = HEAVY) -> CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WATCHED, ",".join(blocked), ",".join(watch), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def loaded(done: CompletedProcess[str]) -> list[str]:
    return done.stdout.splitlines()[-1].split()[1:]


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    return np.asarray(opened(path))


@pytest.fixture
def named(bundle: Path, qie_home: Path) -> str:
    """A bundle with a name in the home of this test; its files may be changed."""
    shutil.copytree(bundle, qie_home / "bundles" / "mine")
    return "mine"


# Help, version, recipes, doctor


def test_help_names_every_command(qie: Qie) -> None:
    done = qie("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)
    assert set(listed) >= {"build", "doctor", "export", "inspect", "list", "recipes", "rm", "run"}


@pytest.mark.parametrize("command", ["build", "doctor", "export", "inspect", "list", "recipes", "rm", "run"])
def test_every_command_has_help(qie: Qie, command: str) -> None:
    done = qie(command, "--help")
    assert done.returncode == 0
    assert f"qie {command}" in done.stdout
    assert done.stderr == ""


def test_version(qie: Qie) -> None:
    assert qie("--version").stdout == f"qie {package.__version__}\n"


def test_recipes(qie: Qie) -> None:
    text = qie("recipes").stdout
    rows = json.loads(qie("recipes", "--json").stdout)["recipes"]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    for row in rows:
        assert re.search(rf"^{row['name']} +{re.escape(row['gpu'])}", text, re.MULTILINE)
        assert set(row) == {"name", "gpu", "compute_capability", "memory_gib", "backends", "transformer"}


def test_a_shown_recipe_is_a_recipe(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    Path("shown.toml").write_text(qie("recipes", "show", "cpu").stdout)
    done = qie("build", checkpoint, "--gpu", "shown.toml", "--dry-run", "--json")
    assert json.loads(done.stdout)["recipe"] == "shown.toml"


def test_doctor(qie: Qie, named: str, qie_home: Path) -> None:
    text = qie("doctor").stdout
    assert re.search(r"^run engines of onnxruntime +yes", text, re.MULTILINE)
    assert re.search(rf"^{named} +runs here$", text, re.MULTILINE)
    report = json.loads(qie("doctor", "--json").stdout)
    assert set(report) >= {"qie", "python", "machine", "home", "free_bytes", "abilities", "bundles"}
    assert report["home"] == str(qie_home)
    assert report["bundles"] == [{"name": named, "reason": None}]


# Build


def test_build_then_edit(qie: Qie, workplace: Path, checkpoint: Path, qie_home: Path) -> None:
    done = qie("build", checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tiny (edit_plus) by recipe cpu, LoRAs: none" in done.stdout
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
    fp8 = '[components.transformer]\nquantization = "fp8"\nkeep = []\nattention = "fp8"\n'
    Path("small.toml").write_text(f'extends = "l40s"\n[shapes]\nmin_side = 32\n{fp8}')
    plan = json.loads(qie("build", checkpoint, "--gpu", "small.toml", "--dry-run", "--json").stdout)
    transformer = next(part for part in plan["components"] if part["component"] == "transformer")
    assert [transformer[key] for key in ("precision", "quantization", "attention")] == ["bfloat16", "fp8", "fp8"]
    assert "bfloat16, fp8, fp8 attention" in qie("build", checkpoint, "--gpu", "small.toml", "--dry-run").stdout


def test_dry_run_needs_no_weights(qie: Qie, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bare", ARCHITECTURES["tiny"], weights=False)
    assert qie("build", folder, "--dry-run").returncode == 0


def test_export(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    done = qie("export", checkpoint)
    assert done.stdout.splitlines() == [f"graphs/{component}.onnx" for component in COMPONENTS]
    assert all(Path(line).is_file() for line in done.stdout.splitlines())
    bare = json.loads(qie("export", checkpoint, "-o", "bare", "--no-weights", "--json").stdout)
    assert bare == {"files": [f"bare/{component}.onnx" for component in COMPONENTS]}
    assert sorted(path.name for path in Path("bare").iterdir()) == sorted(f"{name}.onnx" for name in COMPONENTS)


@pytest.mark.parametrize("words", [("build", "--dry-run"), ("export", "--no-weights")], ids=["build", "export"])
def test_the_published_model_costs_seconds_and_little_memory(
    words: tuple[str, str], workplace: Path, qie_home: Path
) -> None:
    """Under 600 MB; the process's own limit, 60 seconds, is no measurement."""
    folder = write_checkpoint(workplace / "2511", ARCHITECTURES["qwen-image-edit-2511"], weights=False)
    peak = "re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]"
    script = (
        "import re, sys; from pathlib import Path; from qie.compiler.cli.app import main\n"
        f"try: main()\nfinally: print({peak}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, words[0], str(folder), "--gpu", "l40s", words[1], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < 600e6
    if words[0] == "build":
        plan = json.loads(done.stdout)
        counts = {part["component"]: part["parameters"] for part in plan["components"]}
        assert round(counts["transformer"] / 1e9, 2) == 13.51
        assert 7.0e9 < counts["language"] < 7.1e9
        assert plan["modulation_bytes"] > 2 * 6.8e9
    else:
        assert sum(path.stat().st_size for path in Path("graphs").iterdir()) < 20e6


# Run


def test_stdout_is_the_path_alone(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "make it red", "-o", "red.png", "--seed", "7", "--bundle", bundle)
    assert done.returncode == 0
    assert done.stdout == "red.png\n"
    said = done.stderr.splitlines()
    assert said[0] == "tiny: the weights are random: an edit shows that everything runs, its result is noise"
    assert said[1].startswith("tiny (tiny-cpu), 160x96, 20 steps, guidance 4 away from ' ', ")
    assert said[2:] == ["seed 7: "]
    assert "%" not in done.stderr and "\x1b" not in done.stderr


def test_run_as_json(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "make it red", "--seed", "7", "--bundle", bundle, "--steps", "2", "--json")
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    seconds = answer.pop("seconds")
    assert "random" in answer.pop("about")
    assert answer == {
        "images": [{"path": "photo-edited.png", "seed": 7, "width": 160, "height": 96}],
        "instruction": "make it red",
        "negative": " ",
        "bundle": str(bundle),
        "model": "tiny",
        "made_at": {"width": 160, "height": 96},
        "steps": 2,
        "guidance": 4.0,
        "notes": [],
    }
    assert set(seconds) == {"vision", "language", "vae_encoder", "modulation", "transformer", "vae_decoder"}


def test_run_as_json_without_guidance(qie: Qie, workplace: Path, bundle: Path) -> None:
    answer = json.loads(qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--json").stdout)
    assert answer["guidance"] is None
    assert answer["negative"] is None


def test_no_file_is_overwritten_without_being_named(qie: Qie, workplace: Path, bundle: Path) -> None:
    Path("photo-edited.png").write_text("mine")
    Path("photo-edited-3.png").write_text("mine too")
    first = qie("run", "photo.png", "x", "--bundle", bundle, *RUN)
    assert first.stdout == "photo-edited-2.png\n"
    several = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--num-images", "2")
    assert several.stdout.splitlines() == ["photo-edited-4.png", "photo-edited-5.png"]
    assert Path("photo-edited.png").read_text() == "mine"
    assert Path("photo-edited-3.png").read_text() == "mine too"


def test_several_results_have_consecutive_seeds(qie: Qie, workplace: Path, bundle: Path) -> None:
    common = ("run", "photo.png", "make it red", "--bundle", bundle, *RUN)
    done = qie(*common, "--seed", "5", "--num-images", "3", "-o", "out.png")
    assert done.stdout.splitlines() == ["out-1.png", "out-2.png", "out-3.png"]
    assert re.findall(r"seed (\d+): ", done.stderr) == ["5", "6", "7"]
    assert not Path("out.png").exists()
    assert qie(*common, "--seed", "6", "-o", "six.png").returncode == 0
    assert np.array_equal(pixels("six.png"), pixels("out-2.png"))
    assert not np.array_equal(pixels("out-1.png"), pixels("out-2.png"))


def test_drawn_seeds_are_told_and_consecutive(qie: Qie, workplace: Path, bundle: Path) -> None:
    done = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--num-images", "2", "--json")
    first, second = (image["seed"] for image in json.loads(done.stdout)["images"])
    assert second == first + 1
    repeated = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--seed", str(first), "-o", "again.png")
    assert repeated.returncode == 0
    assert np.array_equal(pixels("again.png"), pixels("photo-edited.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_the_same_seed_gives_the_same_bytes(qie: Qie, workplace: Path, bundle: Path, suffix: str) -> None:
    for name in ("a", "b"):
        words = ("--seed", "3", "-o", f"{name}.{suffix}", "--bundle", bundle, "--steps", "2")
        assert qie("run", "photo.png", "make it red", *words).returncode == 0
    assert Path(f"a.{suffix}").read_bytes() == Path(f"b.{suffix}").read_bytes()
    other = ("--seed", "4", "-o", f"c.{suffix}", "--bundle", bundle, "--steps", "2")
    assert qie("run", "photo.png", "make it red", *other).returncode == 0
    assert Path(f"a.{suffix}").read_bytes() != Path(f"c.{suffix}").read_bytes()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_match_input_gives_the_size_that_a_viewer_shows(
    qie: Qie, workplace: Path, bundle: Path, orientation: int
) -> None:
    image = opened("photo.png")
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save("turned.jpg", exif=exif)
    done = qie("run", "turned.jpg", "x", "--bundle", bundle, *RUN, "--match-input", "-o", "out.png")
    assert done.returncode == 0
    assert opened("out.png").size == ((90, 150) if orientation == 6 else (150, 90))
    assert ("note: turned.jpg: EXIF orientation applied" in done.stderr) == (orientation != 1)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("alpha.png", "alpha channel flattened onto white"),
        ("deep.png", "16-bit reduced to 8-bit"),
        ("gray.png", "grayscale expanded to RGB"),
        ("photo.jpg", None),
        ("photo.webp", None),
        ("alpha.webp", "alpha channel flattened onto white"),
    ],
)
def test_kinds_of_images(qie: Qie, workplace: Path, bundle: Path, name: str, note: str | None) -> None:
    image = opened("photo.png")
    if name.startswith("alpha"):
        image.putalpha(128)
    elif name.startswith("gray"):
        image = image.convert("L")
    elif name.startswith("deep"):
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.save(name)
    done = qie("run", name, "make it red", "--bundle", bundle, *RUN, "-o", "out.png")
    assert done.returncode == 0, done.stderr
    assert pixels("out.png").shape == (96, 160, 3)
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert (f"note: {name}: {note}" in notes) if note else notes == []


@pytest.mark.parametrize(
    ("wanted", "made", "reason"),
    [
        ("96x64", (96, 64), None),
        ("100x70", (96, 64), "sides are multiples of 16 pixels"),
        ("1024X1024", (128, 128), "the nearest bucket: this bundle takes sides of at most 192 pixels"),
        ("2000x500", (192, 96), "the nearest bucket"),
        ("16x16", (128, 128), "the nearest bucket: this bundle takes sides of at least 32 pixels"),
    ],
)
def test_size(qie: Qie, workplace: Path, bundle: Path, wanted: str, made: tuple[int, int], reason: str | None) -> None:
    done = qie("run", "photo.png", "x", "--bundle", bundle, *RUN, "--size", wanted, "-o", "out.png")
    assert opened("out.png").size == made
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    if reason is None:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"note: asked for {wanted.lower()}, using {made[0]}x{made[1]}")
        assert reason in note


def test_several_images(qie: Qie, workplace: Path, bundle: Path) -> None:
    """The last one gives the size; all of them count."""
    opened("photo.png").rotate(90, expand=True).save("tall.png")
    common = ("make it red", "--bundle", bundle, *RUN, "--seed", "1")
    assert qie("run", "photo.png", "tall.png", *common).stdout == "tall-edited.png\n"
    assert pixels("tall-edited.png").shape == (160, 96, 3)
    qie("run", "photo.png", "photo.png", "tall.png", *common, "-o", "three.png")
    assert not np.array_equal(pixels("three.png"), pixels("tall-edited.png"))


def test_the_newest_bundle_is_the_default(qie: Qie, workplace: Path, named: str, qie_home: Path) -> None:
    older = qie_home / "bundles" / "older"
    shutil.copytree(qie_home / "bundles" / named, older)
    os.utime(older / "manifest.json", (1, 1))
    answer = json.loads(qie("run", "photo.png", "x", *RUN, "--json").stdout)
    assert answer["bundle"] == str(qie_home / "bundles" / named)
    os.utime(older / "manifest.json", (2**32, 2**32))
    answer = json.loads(qie("run", "photo.png", "x", *RUN, "--json").stdout)
    assert answer["bundle"] == str(older)


# List, inspect, rm


def test_list(qie: Qie, named: str, qie_home: Path) -> None:
    text = qie("list").stdout
    assert re.search(r"^mine +tiny +cpu +[\d.]+ MB +\S", text, re.MULTILINE)
    answer = json.loads(qie("list", "--json").stdout)
    assert answer["folder"] == str(qie_home / "bundles")
    (row,) = answer["bundles"]
    assert set(row) == {"name", "built", "model", "recipe", "bytes", "problem"}
    assert (row["name"], row["model"], row["recipe"], row["problem"]) == ("mine", "tiny", "cpu", None)


def test_list_without_bundles(qie: Qie, qie_home: Path) -> None:
    assert qie("list").stdout.startswith(f"no bundles in {qie_home / 'bundles'}; make one with `qie build")
    assert json.loads(qie("list", "--json").stdout)["bundles"] == []


def test_inspect(qie: Qie, bundle: Path) -> None:
    done = qie("inspect", bundle, "--verify")
    assert done.stdout.endswith("every file is as it was built\n")
    for component in COMPONENTS:
        assert re.search(rf"^{component} +onnxruntime/cpu .* yes$", done.stdout, re.MULTILINE)
    answer = json.loads(qie("inspect", bundle, "--json").stdout)
    assert set(answer) == {"path", "bytes", "verified", "engines", "manifest"}
    assert answer["verified"] is False
    assert answer["manifest"] == json.loads((bundle / "manifest.json").read_text())
    assert [engine["component"] for engine in answer["engines"]] == list(COMPONENTS)
    assert all(engine["runs_here"] and engine["reason"] is None for engine in answer["engines"])


@pytest.mark.parametrize(("answer", "deleted"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_rm_asks(named: str, qie_home: Path, answer: str, deleted: bool) -> None:
    command = [sys.executable, "-c", "from qie.compiler.cli.app import main; main()", "rm", named]
    done = subprocess.run(command, input=answer, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(f"delete {qie_home.resolve() / 'bundles' / named}?")
    assert (qie_home / "bundles" / named).exists() != deleted


def test_rm_yes_does_not_ask(qie: Qie, named: str, qie_home: Path) -> None:
    done = qie("rm", named, "--yes")
    assert done.stdout == f"deleted {qie_home.resolve() / 'bundles' / named}\n"
    assert list((qie_home / "bundles").iterdir()) == []


def test_rm_of_the_folder_that_one_is_in(
    qie: Qie, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert qie("rm", ".", "--yes").returncode == 0
    assert not (tmp_path / "here").exists()


# What is imported, and what happens where it is not installed


def test_help_imports_nothing(workplace: Path) -> None:
    done = watched("--help", watch=HEAVY + RUNTIME)
    assert done.returncode == 0, done.stderr
    assert loaded(done) == []


def test_an_edit_imports_the_runtime_alone(workplace: Path, bundle: Path) -> None:
    done = watched("run", "photo.png", "make it red", "--bundle", bundle, "--steps", "2", watch=HEAVY + RUNTIME)
    assert done.returncode == 0, done.stderr
    assert Path("photo-edited.png").is_file()
    assert loaded(done) == list(RUNTIME)


def test_the_test_of_imports_can_fail(checkpoint: Path, workplace: Path) -> None:
    assert "onnxscript" in loaded(watched("build", checkpoint, "--dry-run"))


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("run", "photo.png", "x", *RUN), ("list",), ("inspect", "mine"),
              ("doctor",), ("recipes",), ("recipes", "show", "l40s"), ("rm", "mine", "--yes")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_the_thin_runtime_works_alone(words: tuple[str, ...], workplace: Path, named: str) -> None:
    done = watched(*words, blocked=HEAVY)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if words == ("doctor",):
        assert re.search(r"^build bundles for a CPU +no .*pip install 'qie\[compile\]'", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["build", "export"])
def test_building_says_what_to_install(command: str, workplace: Path, checkpoint: Path) -> None:
    done = watched(command, checkpoint, blocked=HEAVY)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: building needs \w+, which is not installed; run `pip install 'qie\[compile\]'`\n", done.stderr
    )


# Processes: terminals and signals


def test_bars_are_drawn_on_a_terminal(workplace: Path, bundle: Path) -> None:
    master, slave = pty.openpty()
    script = "from qie.compiler.cli.app import main; main()"
    words = ("run", "photo.png", "make it red", "--bundle", str(bundle), "--steps", "3", "--cfg", "1")
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as running:
        os.close(slave)
        drawn = b""
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            drawn += piece
        assert running.stdout is not None
        assert running.stdout.read() == "photo-edited.png\n"
    os.close(master)
    assert running.returncode == 0
    text = drawn.decode()
    for stage in ("vision", "language", "encode", "denoise", "decode"):
        assert re.search(rf"{stage}\b.*?100%", text, re.DOTALL), stage


def test_an_interrupted_build_leaves_nothing(workplace: Path, checkpoint: Path, qie_home: Path) -> None:
    long = 'extends = "cpu"\n' + "".join(f"[[schedules]]\nsteps = {n}\nguidance = 4.0\n" for n in range(700, 900))
    Path("long.toml").write_text(long)
    # A background job of a shell ignores SIGINT, and so would what the tests start if they run as one.
    attentive = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    script = attentive + "from qie.compiler.cli.app import main; main()"
    words = ["build", str(checkpoint), "--gpu", "long.toml", "--name", "long"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        while not list(qie_home.glob("bundles/.long.*.tmp/schedules/*.npy")):
            assert running.poll() is None
            time.sleep(0.005)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate()
    assert running.returncode == 130
    assert "Traceback" not in err
    assert list((qie_home / "bundles").iterdir()) == []
