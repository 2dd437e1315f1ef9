"""The builder for TensorRT-LLM: ``trtllm-build`` turns the checkpoint of a bundle into an engine, on its GPU."""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from qie.compiler.backends.failures import OUT_OF_MEMORY, SHOWN, ending
from qie.compiler.backends.local_gpu import no_local_gpu
from qie.compiler.backends.tensorrt_llm.command import ENCODER_FILE, ENCODER_SOURCE, build_command
from qie.compiler.recipe.schema import Recipe
from qie.engines import backends
from qie.engines.backends import BACKENDS, installed
from qie.engines.bundle.manifest import EngineRecord, GraphRecord, ProfileRecord, file_record
from qie.engines.errors import BackendMissingError, BuildError, BundleError
from qie.engines.machine import GIB, choose_gpu, this_machine
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.tensorrt_llm.config import read_config

__all__ = ["build", "command_of", "unavailable", "version", "write_files"]

BACKEND = "tensorrt-llm"

PROGRAM = "trtllm-build"

ENGINE_FILES = ("rank0.engine", "config.json")
"""What trtllm-build writes of an engine for one GPU."""

SCRIPT = "build.sh"
"""Name of the script with the command, beside the checkpoint."""

_ENGINE = "ENGINE"
"""Stands for the folder of the engine in the script."""

_TAIL, _LONGEST = 1 << 16, 500
"""Bytes of the log that are read, and characters of a line that are shown."""

_LIBC = ctypes.CDLL(None)

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that a process gets when its parent ends (linux/prctl.h)."""


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
    command = command_of(
        checkpoint, engine, graph.profiles, recipe, program=program, model_class=ENCODER_SOURCE
    )  # its own file, not one of the bundle: the program executes it
    progress(0, 1)
    peak = _run(command, graph, recipe, {**os.environ, "CUDA_VISIBLE_DEVICES": gpu.uuid})
    missing = [name for name in ENGINE_FILES if not (engine / name).is_file()]
    if missing:
        raise BuildError(
            f"{PROGRAM} ended well and wrote no {missing[0]}; install the version of {BACKEND} that qie is for with "
            f"`{BACKENDS[BACKEND].build_install}`"
        )
    unusable = _unusable(engine)
    if unusable is not None:
        raise BuildError(
            f"{PROGRAM} ended well, and its engine cannot be used ({unusable}); install the version of {BACKEND} that "
            f"qie is for with `{BACKENDS[BACKEND].build_install}`"
        )
    for file in engine.iterdir():
        if file.name not in ENGINE_FILES:  # timings
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
    progress(1, 1)
    return EngineRecord(
        component=graph.component,
        backend=BACKEND,
        compute_capability=str(recipe.compute_capability),
        backend_version=version(),
        precision=graph.precision,
        key=key,
        path=f"{engine.name}/{ENGINE_FILES[0]}",
        files=tuple(file_record(folder, f"{engine.name}/{name}") for name in ENGINE_FILES),
        inputs=graph.inputs,
        outputs=graph.outputs,
        parameters=graph.parameters,
        quantization=graph.quantization,
        build_seconds=round(time.perf_counter() - start, 3),
        build_peak_bytes=peak,
        profiles=graph.profiles,
    )


def _unusable(engine: Path) -> str | None:
    """Why no session can load what is in the folder ``engine``; None where one may."""
    if not (engine / "rank0.engine").stat().st_size:
        return "rank0.engine is empty"
    try:
        read_config(engine / "config.json")
    except BundleError as problem:
        return str(problem).partition(";")[0]
    return None


def write_files(checkpoint: Path, profiles: tuple[ProfileRecord, ...], recipe: Recipe) -> tuple[str, ...]:
    """Write beside ``checkpoint`` what building its engine takes: the model's class, and the command as a script.

    Returns:
        The names of the files.
    """
    shutil.copyfile(ENCODER_SOURCE, checkpoint / ENCODER_FILE)
    words = [shlex.quote(word) for word in command_of(Path(), Path(_ENGINE), profiles, recipe)]
    words = [f'"${{engine}}"{word.removeprefix(_ENGINE)}' if word.startswith(_ENGINE) else word for word in words]
    lines = [
        "#!/bin/sh",
        "# Builds the engine of the language model into a folder, with TensorRT-LLM on the GPU of the recipe.",
        "# `qie build --finish` runs the same command and puts the engine into the bundle.",
        ': "${1:?name the folder to write the engine to}"',
        'engine=$(realpath -m -- "$1") || exit',
        'CDPATH= cd -- "$(dirname -- "$(realpath -- "$0")")" || exit',
        f"exec {' '.join(words)}",
    ]
    (checkpoint / SCRIPT).write_text("\n".join([*lines, ""]))
    (checkpoint / SCRIPT).chmod(0o755)
    return ENCODER_FILE, SCRIPT


def command_of(
    checkpoint: Path,
    engine: Path,
    profiles: tuple[ProfileRecord, ...],
    recipe: Recipe,
    *,
    program: str = PROGRAM,
    model_class: Path | None = None,
) -> list[str]:
    """The command that builds the engine of the folder ``checkpoint`` into the folder ``engine``.

    Args:
        checkpoint: folder.
        engine: folder.
        profiles: of the language model's graph.
        recipe: the recipe.
        program: name or path of trtllm-build.
        model_class: file of the model's class; None for the one beside the checkpoint.
    """
    shapes = {profile.input: profile for profile in profiles}
    return build_command(
        checkpoint,
        engine,
        prompt_tokens=shapes["input_ids"].max[1],
        tuned_tokens=shapes["input_ids"].opt[1],
        image_tokens=shapes["image_embeds"].max[0],
        scheme=recipe.components.language.scheme,
        program=program,
        model_class=model_class,
    )


def _program() -> str | None:
    """The program that builds, beside this Python or on the PATH; None where there is none."""
    beside = Path(sys.executable).with_name(PROGRAM)
    found = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    return None if found is None else str(Path(found).absolute())


def _run(command: list[str], graph: GraphRecord, recipe: Recipe, environment: dict[str, str]) -> int:
    """Run the program in a folder of its own, for whatever it writes where it is; returns its peak memory in bytes.

    Raises:
        BuildError: it fails.
    """
    with (
        tempfile.TemporaryDirectory() as place,
        tempfile.TemporaryFile() as log,
    ):
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=place,
                env=environment,
                start_new_session=True,
                preexec_fn=partial(_LIBC.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),  # it ends with this process
            )
        except OSError as problem:
            raise BuildError(
                f"{command[0]} cannot be started ({problem.strerror or problem}); install {BACKEND} again with "
                f"`{BACKENDS[BACKEND].build_install}`"
            ) from problem
        with process:
            try:
                _, status, usage = os.wait4(process.pid, 0)
                code = process.returncode = os.waitstatus_to_exitcode(status)
            finally:
                with suppress(ProcessLookupError):  # nobody of it is left
                    os.killpg(process.pid, signal.SIGKILL)
        if code == 0:
            return usage.ru_maxrss * 1024
        log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL))
        lines = [line.strip()[:_LONGEST] for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        lines = lines[-SHOWN:]
    weights = sum(file.bytes for file in graph.files) / GIB
    if code == -signal.SIGKILL or any(OUT_OF_MEMORY.search(line) for line in lines):
        raise BuildError(
            f"memory ran out while {PROGRAM} compiled {graph.component} ({', '.join(lines) or 'it was killed'}), whose "
            f"weights take {weights:.1f} GiB on the {recipe.gpu} and again in host memory; build on a machine with "
            "more memory, or with another backend"
        )
    reason = ", ".join(lines) or f"it ended {ending(code)} without a message"
    raise BuildError(
        f"{PROGRAM} built no engine of {graph.component} ({reason}); set another backend for it in the recipe"
    )
