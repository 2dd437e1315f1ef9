"""Processes on the GPU: how one ends that closed nothing, and the kernels that one leaves for the next."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle
from tests.support import gpu_bundles
from tests.support.editors import uncached_editor
from tests.support.gpu_bundles import edit_request
from tests.support.python import run_python

SCRIPT = """
import os, signal, sys
import numpy as np
from qie.engines.editing.editor import Editor
from tests.support.gpu_bundles import edit_request, fail, stop
editor = Editor(sys.argv[1], residency=sys.argv[2])
"""

ENDS = {
    "at exit": ("np.save(sys.argv[3], np.asarray(editor.edit(edit_request()).images[0]))", 0),
    "after an exception in the loop": ("editor.edit(edit_request(), progress=stop(fail))", 1),
    "after Ctrl-C in the loop": (
        "editor.edit(edit_request(), progress=stop(lambda: os.kill(os.getpid(), signal.SIGINT)))",
        -signal.SIGINT,
    ),
}


def run(bundle: Bundle, script: str, residency: str = "resident", result: Path | None = None) -> tuple[int, str]:
    """Exit code and stderr of a process that edits with ``bundle`` and does not close its editor."""
    program = gpu_bundles.PROLOGUE + SCRIPT + script
    done = run_python(program, str(bundle.path), residency, str(result))
    return done.returncode, done.stderr


@pytest.mark.parametrize("residency", ["resident", "sequential"])
@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_closes_nothing_ends_as_it_should(
    on_tensorrt: Bundle, tmp_path: Path, end: str, residency: str
) -> None:
    script, expected = ENDS[end]
    code, stderr = run(on_tensorrt, script, residency, tmp_path / "image.npy")
    assert code == expected, stderr


def test_processes_share_the_kernels_of_an_engine(on_tensorrt: Bundle, tmp_path: Path) -> None:
    """One after another, and two at once; all give the bytes of this process."""
    with uncached_editor(on_tensorrt) as editor:
        expected = np.asarray(editor.edit(edit_request()).images[0])
    script, _ = ENDS["at exit"]
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    assert run(on_tensorrt, script, result=paths[0])[0] == 0
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda path: run(on_tensorrt, script, result=path), paths[1:]))
    assert [code for code, _ in ends] == [0, 0], ends
    assert all(np.array_equal(np.load(path), expected) for path in paths)


def test_an_interrupt_leaves_an_editor_that_works(on_tensorrt: Bundle) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done == 2:
            raise KeyboardInterrupt

    with uncached_editor(on_tensorrt) as editor:
        first = editor.edit(edit_request())
        with pytest.raises(KeyboardInterrupt):
            editor.edit(edit_request(), progress=interrupt)
        again = editor.edit(edit_request())
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))


def test_threads_share_an_editor(on_tensorrt: Bundle) -> None:
    seeds = [1, 2, 1, 2]
    with uncached_editor(on_tensorrt) as editor:
        expected = {seed: np.asarray(editor.edit(edit_request(seeds=[seed])).images[0]) for seed in set(seeds)}
        with ThreadPoolExecutor(2) as pool:
            edits = list(pool.map(lambda seed: editor.edit(edit_request(seeds=[seed])), seeds))
    assert all(
        np.array_equal(np.asarray(edit.images[0]), expected[seed]) for edit, seed in zip(edits, seeds, strict=True)
    )
