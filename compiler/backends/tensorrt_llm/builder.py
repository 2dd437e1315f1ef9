"""The builder for TensorRT-LLM: ``trtllm-build`` turns the checkpoint of a bundle into an engine, on its GPU."""

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qie.compiler.backends.failures import OUT_OF_MEMORY, ending
from qie.compiler.backends.local_gpu import no_local_gpu
from qie.compiler.backends.tensorrt_llm.command import build_command
from qie.compiler.recipe.schema import Recipe
from qie.engines import backends
from qie.engines.backends import BACKENDS, installed
from qie.engines.bundle.manifest import EngineRecord, GraphRecord, ProfileRecord, file_record
from qie.engines.errors import BackendMissingError, BuildError
from qie.engines.machine import GIB, choose_gpu, this_machine
from qie.engines.progress import StageProgress, no_progress

__all__ = ["build", "command_of", "unavailable", "version", "write_files"]

BACKEND = "tensorrt-llm"

PROGRAM = "trtllm-build"

SCRIPT = "build.sh"
"""Name of the script with the command, beside the checkpoint."""

MODEL_CLASS = Path(__file__).with_name("encoder.py")
"""The file with the model's class, which trtllm-build loads."""

SHOWN = 3
"""Lines of the program's log in an error."""


def version() -> str:
    """The version of the installed package."""
    return backends.version(BACKEND)


def unavailable(recipe: Recipe, device: int | None = None) -> str | None:
    """Why this machine, or its GPU ``device``, cannot build for the recipe's GPU, a semicolon, and the fix."""
    install = BACKENDS[BACKEND].build_install
    if not installed(BACKENDS[BACKEND].build_module):
        return f"{BACKEND} is not installed; run `{install}` on the machine with the GPU"
    if _program() is None:
        return f"{BACKEND} is installed without {PROGRAM}, which its last version has; run `{install}`"
    return no_local_gpu(BACKEND, recipe, device)


def build(
    graph: GraphRecord,
    folder: Path,
    *,
    key: str,
    recipe: Recipe,
    device: int | None = None,
    progress: StageProgress = no_progress,
) -> EngineRecord:
    """Build an engine of the checkpoint ``graph`` (``Builder.build``).

    Raises:
        BackendMissingError: there is no ``trtllm-build``.
        EngineMismatchError: there is no such GPU any more.
        BuildError: the program fails, memory or disk space runs out.
    """
    start = time.perf_counter()
    program = _program()
    if program is None:
        raise BackendMissingError(f"{PROGRAM} is not installed; run `{BACKENDS[BACKEND].build_install}`")
    gpu = choose_gpu(this_machine(), str(recipe.compute_capability), device)
    checkpoint = (folder / graph.path).parent
    engine = folder / f"{graph.component}.{BACKEND}-{recipe.compute_capability}"
    command = command_of(str(checkpoint), str(engine), graph.profiles, recipe)
    progress(0, 1)
    _run([program, *command[1:]], graph, recipe, {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid})
    files = sorted(file for file in engine.iterdir() if file.is_file()) if engine.is_dir() else []
    path = engine / "rank0.engine"
    if path not in files or engine / "config.json" not in files:
        found = ", ".join(file.name for file in files) or "nothing"
        raise BuildError(
            f"{PROGRAM} ended well and wrote {found}, expected rank0.engine and config.json; install the version of "
            f"{BACKEND} that qie is for with `{BACKENDS[BACKEND].build_install}`"
        )
    progress(1, 1)
    return EngineRecord(
        component=graph.component,
        backend=BACKEND,
        compute_capability=str(recipe.compute_capability),
        backend_version=version(),
        precision=graph.precision,
        key=key,
        path=str(path.relative_to(folder)),
        files=tuple(file_record(folder, str(file.relative_to(folder))) for file in files),
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters,
        quantization=graph.quantization,
        build_seconds=round(time.perf_counter() - start, 3),
        build_peak_bytes=resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        profiles=graph.profiles,
    )


def write_files(checkpoint: Path, profiles: tuple[ProfileRecord, ...], recipe: Recipe) -> tuple[str, ...]:
    """Write beside ``checkpoint`` what building its engine takes: the model's class, and the command as a script.

    Returns:
        The names of the files.
    """
    shutil.copyfile(MODEL_CLASS, checkpoint / MODEL_CLASS.name)
    words = [shlex.quote(word) for word in command_of(".", "ENGINE", profiles, recipe)]
    words[words.index("ENGINE")] = '"$engine"'
    lines = [
        "#!/bin/sh",
        "# Builds the engine of the language model into a folder, with TensorRT-LLM on the GPU of the recipe.",
        "# `qie build --finish` runs the same command and puts the engine into the bundle.",
        'engine=$(realpath -m "${1:?name the folder to write the engine to}")',
        'cd "$(dirname "$0")" || exit',
        f"exec {' '.join(words)}",
    ]
    (checkpoint / SCRIPT).write_text("\n".join([*lines, ""]))
    (checkpoint / SCRIPT).chmod(0o755)
    return MODEL_CLASS.name, SCRIPT


def command_of(checkpoint: str, engine: str, profiles: tuple[ProfileRecord, ...], recipe: Recipe) -> list[str]:
    """The command that builds the engine of the folder ``checkpoint`` into the folder ``engine``.

    Args:
        checkpoint: folder.
        engine: folder.
        profiles: of the language model's graph.
        recipe: the recipe.
    """
    largest = {profile.input: profile.max for profile in profiles}
    typical = {profile.input: profile.opt for profile in profiles}
    section = recipe.components.language
    return build_command(
        checkpoint,
        engine,
        prompt_tokens=largest["input_ids"][1],
        tuned_tokens=typical["input_ids"][1],
        image_tokens=largest["image_embeds"][0],
        dtype=section.precision,
        scheme=section.scheme,
    )


def _program() -> str | None:
    """The program that builds, beside this Python or on the PATH; None where there is none."""
    beside = Path(sys.executable).with_name(PROGRAM)
    return str(beside) if beside.is_file() else shutil.which(PROGRAM)


def _run(command: list[str], graph: GraphRecord, recipe: Recipe, environment: dict[str, str]) -> None:
    """Run the program in a folder of its own, to which it writes a cache of timings.

    Raises:
        BuildError: it fails.
    """
    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
    ):
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=place,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                code = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if code == 0:
            return
        log.seek(0)
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    weights = sum(file.bytes for file in graph.files) / GIB
    if code == -signal.SIGKILL or any(OUT_OF_MEMORY.search(line) for line in lines):
        raise BuildError(
            f"memory ran out while {PROGRAM} compiled {graph.component}, whose weights take {weights:.1f} GiB on the "
            f"{recipe.gpu} and again in host memory; build on a machine with more memory, or with another backend"
        )
    reason = ", ".join(lines[-SHOWN:]) or f"it ended {ending(code)} without a message"
    raise BuildError(
        f"{PROGRAM} built no engine of {graph.component} ({reason}); set another backend for it in the recipe"
    )
