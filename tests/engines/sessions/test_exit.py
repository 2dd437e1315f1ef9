"""How a process ends that did not close its editor: in the right order, or the library would crash at exit.

The fake aborts the process where the library would (``Device.crash``), so each case runs in a process of its own.
"""

import signal
from pathlib import Path

import pytest

from tests.support.fake_gpu import Gpu
from tests.support.python import run_python

PROLOGUE = """
import os, signal, sys
import pytest
from tests.support.fake_gpu import Gpu
from tests.support.gpu_bundles import edit_request, fail, stop
gpu = Gpu(aborts=True)
gpu.install(pytest.MonkeyPatch(), {backend!r})
from qie.engines.editing.editor import Editor
from qie.engines.sessions.load import load, open_device
editor = Editor({folder!r}, residency={residency!r}, cuda_graphs=True)
"""

CASES = {
    "at exit": ("editor.edit(edit_request())", 0),
    "dropped": ("editor.edit(edit_request()); del editor; import gc; gc.collect()", 0),
    "an exception in the loop": ("editor.edit(edit_request(), progress=stop(fail))", 1),
    "an exception that is handled, with its frames kept": (
        """
try:
    editor.edit(edit_request(), progress=stop(fail))
except RuntimeError as problem:
    kept = problem
editor.close()
assert kept.__traceback__ is not None
""",
        0,
    ),
    "a failure inside a run, with its frames kept": (
        """
from tests.support.fake_gpu import Context
def refuse(context, handle):
    raise RuntimeError("of the library")
Context.execute_async_v3 = refuse
try:
    editor.edit(edit_request())
except Exception as problem:
    kept = problem
assert "of the library" in str(kept), kept
editor.close()
""",
        0,
    ),
    "a failure inside a run that nobody handles": (
        """
from tests.support.fake_gpu import Context
def refuse(context, handle):
    raise RuntimeError("of the library")
Context.execute_async_v3 = refuse
editor.edit(edit_request())
""",
        1,
    ),
    "Ctrl-C in the loop": (
        "editor.edit(edit_request(), progress=stop(lambda: os.kill(os.getpid(), signal.SIGINT)))",
        -signal.SIGINT,
    ),
    "a session of its own, never closed": (
        """
record = next(e for e in editor.bundle.manifest.engines if e.component == "transformer")
device = open_device([record])
session = load(editor.bundle.path, record, device)
""",
        0,
    ),
    "a GPU that fails": (
        """
from tests.support.fake_gpu import Code
editor.edit(edit_request(), progress=stop(lambda: setattr(gpu, "broken", Code.cudaErrorIllegalAddress)))
""",
        1,
    ),
}


@pytest.fixture(scope="module")
def folders(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("exit")
    return {backend: Gpu().retarget(bundle, home / backend, backend) for backend in ("tensorrt-rtx", "tensorrt")}


@pytest.mark.parametrize("residency", ["resident", "sequential"])
@pytest.mark.parametrize("case", CASES)
def test_a_process_ends_as_it_should(folders: dict[str, Path], tmp_path: Path, case: str, residency: str) -> None:
    script, code = CASES[case]
    backend = "tensorrt" if case == "dropped" and residency == "sequential" else "tensorrt-rtx"
    prologue = PROLOGUE.format(backend=backend, folder=str(folders[backend]), residency=residency)
    done = run_python(prologue + script, QIE_HOME=str(tmp_path))
    assert "crash:" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr


def test_the_process_of_the_fake_ends_where_the_librarys_would(folders: dict[str, Path], tmp_path: Path) -> None:
    script = """
from qie.engines.sessions.tensorrt import contexts
contexts._keep_alive = lambda context, needed: None
record = next(e for e in editor.bundle.manifest.engines if e.component == "transformer")
device = open_device([record])
session = load(editor.bundle.path, record, device)
context = session._contexts._new_context()
session.close()
"""
    prologue = PROLOGUE.format(backend="tensorrt-rtx", folder=str(folders["tensorrt-rtx"]), residency="resident")
    done = run_python(prologue + script, QIE_HOME=str(tmp_path))
    assert done.returncode == -signal.SIGABRT, done.stderr
    assert "a runtime cache is destroyed before the contexts that were made with it" in done.stderr
