"""Bundles with the language model for TensorRT-LLM: what is built here, what waits, and what finishing adds."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qie.compiler.backends.tensorrt_llm.command import ENCODER_SOURCE
from qie.compiler.packing import export
from qie.compiler.packing.export import export_graphs
from qie.compiler.packing.finish import finish_bundle
from qie.compiler.planning.checks import other_bundle
from qie.compiler.planning.resolve import plan_build
from qie.compiler.recipe.load import parse_recipe
from qie.compiler.recipe.schema import to_toml
from qie.compiler.validation.rebuild import cpu_recipe
from qie.compiler.validation.run import Options, validate
from qie.engines.bundle.bundle import Bundle, open_bundle, verify
from qie.engines.errors import BackendMissingError, BuildError, BundleError, ExportError
from qie.engines.files import sha256_of
from qie.engines.sessions.choose import choose_engines
from tests.support.bundles import planned
from tests.support.fake_gpu import Gpu
from tests.support.trtllm import bundles
from tests.support.trtllm.checkpoint import open_decoder

FILES = {"config.json", "rank0.safetensors", "encoder.py", "build.sh"}
ENGINE = "language.tensorrt-llm-8.9"


@pytest.fixture(scope="module")
def left(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """What a machine without GPU builds; not to be changed."""
    return bundles.built(checkpoint, tmp_path_factory.mktemp("left") / "bundle")


@pytest.fixture
def copy(left: Bundle, tmp_path: Path) -> Bundle:
    import shutil

    return open_bundle(str(shutil.copytree(left.path, tmp_path / "bundle")))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    gpu = Gpu()
    bundles.install(gpu, monkeypatch, tmp_path / "bin")
    return gpu


def test_what_is_built_without_a_gpu(left: Bundle) -> None:
    """The next backend's engine, and TensorRT-LLM's checkpoint beside it."""
    assert [e.backend for e in left.manifest.engines] == ["onnxruntime"] * 5
    (waiting,) = left.manifest.graphs
    assert (waiting.component, waiting.backend, waiting.precision) == ("language", "tensorrt-llm", "bfloat16")
    folder = left.path / "language.tensorrt-llm"
    assert {file.name for file in folder.iterdir()} == FILES
    assert {file.path for file in waiting.files} == {f"language.tensorrt-llm/{name}" for name in FILES}
    assert waiting.path == "language.tensorrt-llm/config.json"
    assert (folder / "build.sh").stat().st_mode & 0o111
    open_decoder(folder)
    verify(left)


def test_the_checkpoint_is_made_for_the_recipes_prompts(left: Bundle) -> None:
    config = json.loads((left.path / "language.tensorrt-llm" / "config.json").read_text())
    assert config["max_position_embeddings"] == left.manifest.limits.prompt_tokens_max + 64


def test_the_script_builds_what_finishing_builds(copy: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    script = copy.path / "language.tensorrt-llm" / "build.sh"
    done = subprocess.run([script, "by hand"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nameless = subprocess.run([script], capture_output=True, text=True, check=False)
    assert nameless.returncode != 0 and "name the folder to write the engine to" in nameless.stderr
    finish_bundle(copy)
    by_hand = (tmp_path / "by hand" / "rank0.engine").read_bytes()
    assert (copy.path / ENGINE / "rank0.engine").read_bytes() == by_hand


def test_finishing(copy: Bundle, gpu: Gpu) -> None:
    before = copy.manifest
    finished = finish_bundle(copy)
    engine = finished.manifest.engines[0]
    assert (engine.component, engine.backend, engine.backend_version) == ("language", "tensorrt-llm", "1.2.1")
    assert (engine.compute_capability, engine.path) == ("8.9", f"{ENGINE}/rank0.engine")
    assert {file.path for file in engine.files} == {f"{ENGINE}/rank0.engine", f"{ENGINE}/config.json"}
    assert {file.name for file in (copy.path / ENGINE).iterdir()} == {"rank0.engine", "config.json"}
    assert finished.manifest.engines[1:] == before.engines and finished.manifest.graphs == ()
    assert not (copy.path / "language.tensorrt-llm").exists()
    verify(finished)


def test_finishing_without_tensorrt_llm(copy: Bundle) -> None:
    with pytest.raises(BackendMissingError, match="language cannot be built here: tensorrt-llm is not installed; run"):
        finish_bundle(copy)


def test_without_the_program(copy: Bundle, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in later versions, which have no engines."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BackendMissingError, match="tensorrt-llm is installed without trtllm-build"):
        finish_bundle(copy)


def test_another_gpu(copy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundles.install(Gpu(capability="8.0"), monkeypatch, tmp_path / "bin")
    with pytest.raises(BackendMissingError, match="tensorrt-llm builds only for a local GPU, the recipe is for"):
        finish_bundle(copy)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo torch.OutOfMemoryError: CUDA out of memory >&2; exit 1",
            "memory ran out while trtllm-build compiled",
        ),
        ("kill -9 $$", r"memory ran out while trtllm-build compiled language \(it was killed\), whose weights take"),
        ("python3 -c 'print(\"x\" * 3000000)'; exit 1", r"built no engine of language \(x{500}\)"),
        ("exec /none/such", "built no engine of language"),
        (
            "mkdir ${4}; echo a > ${4}/rank0.engine; : > ${4}/config.json",
            "its engine cannot be used .*config.json is not the config",
        ),
        ("echo one; echo two; exit 3", r"built no engine of language \(one, two\); set another backend for it"),
        ("exit 3", r"built no engine of language \(it ended with code 3 without a message\)"),
        (
            "echo 'warning: insufficient memory on requested size 9, skipped'; echo a; echo b; echo c; exit 1",
            r"built no engine of language \(a, b, c\)",
        ),
        ("exit 0", r"trtllm-build ended well and wrote no rank0\.engine; install the version"),
    ],
)
def test_a_program_that_fails(copy: Bundle, gpu: Gpu, tmp_path: Path, script: str, message: str) -> None:
    before = {path: sha256_of(path) for path in copy.path.rglob("*") if path.is_file()}
    (tmp_path / "bin" / "trtllm-build").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(BuildError, match=message):
        finish_bundle(copy)
    assert {path: sha256_of(path) for path in copy.path.rglob("*") if path.is_file()} == before
    assert [path.name for path in copy.path.parent.iterdir() if path.is_dir() and path.name != "bin"] == ["bundle"]


def test_nothing_of_the_program_is_left(copy: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    """Its children end with it, and what it wrote beside its engine goes."""
    program, noted = tmp_path / "bin" / "trtllm-build", tmp_path / "child"
    real = program.rename(program.with_name("real"))
    program.write_text(f'#!/bin/sh\nsleep 300 & echo $! > "{noted}"\nmkdir -p "$4/sub/sub"\n"{real}" "$@"\n')
    program.chmod(0o755)
    finish_bundle(copy)
    assert {file.name for file in (copy.path / ENGINE).iterdir()} == {"rank0.engine", "config.json"}
    status = Path(f"/proc/{noted.read_text().strip()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_program_that_cannot_be_started(copy: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "bin" / "trtllm-build").write_text("#!/none/such/python\n")
    with pytest.raises(BuildError, match=r"trtllm-build cannot be started \(No such file .*install tensorrt-llm again"):
        finish_bundle(copy)


def test_a_relative_path_of_programs(copy: Bundle, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin:/usr/bin:/bin")
    assert finish_bundle(copy).manifest.graphs == ()


def test_a_damaged_checkpoint(copy: Bundle, gpu: Gpu) -> None:
    path = copy.path / "language.tensorrt-llm" / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged; build the bundle again"):
        finish_bundle(copy)


def test_the_next_build_keeps_the_checkpoint(checkpoint: Path, copy: Bundle) -> None:
    (waiting,) = copy.manifest.graphs
    inode = (copy.path / waiting.files[1].path).stat().st_ino
    again = bundles.built(checkpoint, copy.path)
    assert again.manifest.graphs == (waiting,)
    assert (again.path / waiting.files[1].path).stat().st_ino == inode


def test_the_next_build_replaces_a_damaged_checkpoint(checkpoint: Path, copy: Bundle) -> None:
    path = copy.path / "language.tensorrt-llm" / "rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    again = bundles.built(checkpoint, copy.path)
    assert again.manifest.graphs == copy.manifest.graphs
    verify(again)


def test_finishing_executes_nothing_of_the_bundle(copy: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "trtllm-build"
    program.write_text(
        program.read_text().replace(
            "import sys", f"import sys; open({str(tmp_path / 'words')!r}, 'w').write(repr(sys.argv))", 1
        )
    )
    finish_bundle(copy)
    assert str(ENCODER_SOURCE) in (tmp_path / "words").read_text()


def test_longer_prompts_are_another_checkpoint(checkpoint: Path, copy: Bundle) -> None:
    (waiting,) = copy.manifest.graphs
    again = bundles.built(checkpoint, copy.path, "[shapes]\nprompt_tokens = { max = 600 }\n")
    assert again.manifest.graphs[0].key != waiting.key
    config = json.loads((again.path / "language.tensorrt-llm" / "config.json").read_text())
    assert config["max_position_embeddings"] == 664


def test_where_everything_is_there(checkpoint: Path, gpu: Gpu, tmp_path: Path) -> None:
    """One build makes TensorRT-LLM's engine, and no other of the language model."""
    bundle = bundles.built(checkpoint, tmp_path / "bundle")
    assert [e.backend for e in bundle.manifest.engines if e.component == "language"] == ["tensorrt-llm"]
    assert bundle.manifest.graphs == ()
    assert not (bundle.path / "language.tensorrt-llm").exists()


def test_the_runtime_takes_the_engine_that_it_can_load(copy: Bundle, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = finish_bundle(copy)
    choose = "qie.engines.sessions.choose"
    monkeypatch.setattr(f"{choose}.serves_gpu", lambda: True)
    monkeypatch.setattr(f"{choose}.cuda_lacking", lambda backend, served: None)
    monkeypatch.setattr(f"{choose}.available", lambda backend: True)
    assert choose_engines(finished)["language"][0].backend == "tensorrt-llm"
    monkeypatch.setattr(f"{choose}.available", lambda backend: backend != "tensorrt-llm")
    assert choose_engines(finished)["language"][0].backend == "onnxruntime"


def test_another_backend_of_the_language_model_is_another_bundle(copy: Bundle, checkpoint: Path) -> None:
    """Under the same name of a recipe: it is not replaced without being asked for."""
    name, (plain, _, _) = copy.manifest.recipe.name, bundles.RECIPE.partition("[components")
    assert other_bundle(replace(planned(checkpoint, copy.path, bundles.RECIPE), recipe_name=name)) is None
    assert other_bundle(replace(planned(checkpoint, copy.path, plain), recipe_name=name)) is not None


def test_a_plan_by_name(qie_home: Path) -> None:
    plan = plan_build("pocket", gpu="l40s", language="tensorrt-llm")
    assert plan.destination.name == "pocket-l40s-tensorrt-llm"
    language = next(p for p in plan.components if p.component == "language")
    assert (language.backend, language.finish) == ("tensorrt-rtx", "tensorrt-llm")
    assert language.bundle_bytes == language.bytes + language.finish_bytes
    assert language.transient_bytes == language.bytes  # of the graph that TensorRT for RTX compiles
    named = plan_build("pocket", gpu="l40s-trtllm")
    assert named.destination.name == "pocket-l40s-trtllm" and named.recipe == plan.recipe


def test_the_plan_counts_what_is_written(left: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    plan = planned(checkpoint, tmp_path / "mine", bundles.RECIPE)
    language = next(p for p in plan.components if p.component == "language")
    written = (left.path / "language.tensorrt-llm" / "rank0.safetensors").stat().st_size
    assert 0 < written - language.finish_bytes < 20_000  # the header


def test_validation_leaves_out_what_is_no_graph(left: Bundle) -> None:
    report = validate(left.path, Options(level="structure"))
    assert [check for check in report.checks if check.result == "failed"] == []


def test_everything_that_reads_bundles_takes_a_finished_one(
    copy: Bundle, gpu: Gpu, bundle: Path, qie: Callable[..., CompletedProcess[str]]
) -> None:
    finish_bundle(copy)
    assert "tensorrt-llm/8.9  bfloat16" in qie("inspect", copy.path).stdout
    assert qie("inspect", copy.path, "--verify").returncode == 0
    assert qie("diff", bundle, copy.path).returncode in (0, 1)
    report = validate(copy.path, Options(level="structure"))
    assert [check for check in report.checks if check.result == "failed"] == []
    assert not any("tensorrt-llm" in check.detail for check in report.checks if check.result == "not run")
    assert qie("rm", copy.path, "--yes").returncode == 0
    assert not copy.path.exists()


def test_the_rebuilt_graphs_are_for_the_cpu(left: Bundle) -> None:
    recipe = cpu_recipe(parse_recipe(left.manifest.recipe.toml, left.path))
    assert recipe.backends_of("language") == ("onnxruntime",)
    assert parse_recipe(to_toml(recipe), left.path) == recipe


def test_an_export(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(checkpoint, tmp_path / "mine", bundles.RECIPE)
    plan = replace(plan, destination=tmp_path / "out")
    files = export_graphs(plan, weights=True)
    llm = {file for file in files if file.parent == tmp_path / "out" / "language.tensorrt-llm"}
    assert {file.name for file in llm} == FILES and all(file.is_file() for file in files)
    needed: list[int] = []
    monkeypatch.setattr(export, "check_download", lambda *_, output_bytes, **__: needed.append(output_bytes))
    export_graphs(plan, weights=True)  # an earlier export is replaced
    written = sum(
        file.stat().st_size for file in plan.destination.rglob("*") if file.suffix in (".weights", ".safetensors")
    )
    assert needed[0] == pytest.approx(written, abs=20_000)
    (files[-1].parent / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match="holds files that are not exported graphs"):
        export_graphs(plan, weights=True)


def test_an_export_that_cannot_be_split(checkpoint: Path, tmp_path: Path) -> None:
    plan = replace(planned(checkpoint, tmp_path / "mine", bundles.RECIPE), destination=tmp_path / "out")
    with pytest.raises(ExportError, match="values of the language model, 1, cannot be split over 2 GPUs; use 1"):
        export_graphs(plan, weights=True, tensor_parallel=2)
    with pytest.raises(ExportError, match="the language model is not for TensorRT-LLM"):
        export_graphs(
            replace(planned(checkpoint, tmp_path / "cpu"), destination=tmp_path / "out"),
            weights=True,
            tensor_parallel=2,
        )
    with pytest.raises(ExportError, match="no weights are written to split"):
        export_graphs(plan, weights=False, tensor_parallel=2)
    assert not (tmp_path / "out").exists()


def test_the_commands(qie: Callable[..., CompletedProcess[str]]) -> None:
    shown = qie("build", "pocket", "--gpu", "l40s", "--language", "tensorrt-llm", "--dry-run").stdout
    assert "tensorrt-rtx, checkpoint" in shown
    assert "the checkpoint of language," in shown and "        --kv_cache_type disabled \\\n" in shown
    plan = qie("plan", "pocket", "--gpu", "l40s-trtllm").stdout
    refused = qie("build", "--finish", "any", "--language", "tensorrt")
    assert refused.returncode == 2 or "finished by its own recipe" in refused.stderr
    table = plan[plan.index("The language model by backend") :]
    assert [line.split()[:2] for line in table.splitlines()[4:7]] == [
        ["tensorrt-llm", "1"],
        ["tensorrt-rtx", "2"],
        ["tensorrt", "3"],
    ]
