"""The largest edit takes what was planned, in a process of its own, or the check fails or says why it did not run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from qie.compiler.planning.estimate import estimate
from qie.compiler.validation import measure
from qie.compiler.validation.checks import memory
from qie.compiler.validation.report import Measurement
from qie.compiler.validation.subject import Subject
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Edit, Request
from qie.engines.editing.settings import resolve
from qie.engines.errors import BackendMissingError, EngineError
from qie.engines.machine import this_machine
from qie.engines.progress import Progress, no_progress
from tests.support.bundles import planned
from tests.support.editors import uncached_editor
from tests.support.subjects import checked, shown


def test_a_bundle_says_what_was_planned(pocket_bundle: Path, tmp_path: Path) -> None:
    plan = planned("pocket", tmp_path / "bundle")
    assert open_bundle(pocket_bundle).manifest.planned_bytes == estimate(plan).gpu_bytes


@pytest.mark.slow
def test_a_sound_bundle_takes_no_more_than_was_planned(sound: Subject) -> None:
    (check,) = checked(sound, "memory")
    assert check.result == "passed"
    assert check.value is not None and 0.2 < check.value < 1
    (figure,) = shown(sound, "memory")
    assert isinstance(figure, Measurement)
    assert (figure.name, figure.unit, figure.planned) == ("peak memory", "bytes", sound.bundle.manifest.planned_bytes)
    assert 100e6 < figure.value < 400e6


def test_the_largest_edit_is_what_the_plan_counts(bundle: Path) -> None:
    with uncached_editor(bundle) as editor:
        request = measure.largest_request(editor)
        limits = editor.bundle.manifest.limits
        settings = resolve(request, editor.bundle.manifest)
        assert len(request.images) == limits.references_max == 3
        assert len(settings.samples) == limits.batch_max == 4
        assert settings.size.area > 0.85 * limits.max_area  # the square of multiples of 32 below it
        assert settings.guided
        longer = replace(request, instructions=[request.instructions[0] + measure.WORD * 8])
        editor.edit(replace(request, steps=1, seeds=[0]))
        with pytest.raises(Exception, match="tokens"):
            editor.edit(replace(longer, steps=1, seeds=[0]))


def test_it_takes_more_than_was_planned(sound: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_planned = sound.bundle.manifest.planned_bytes
    assert bytes_planned is not None
    monkeypatch.setattr(memory, "measured_peak", lambda *_: int(1.2 * bytes_planned))
    (check,) = checked(sound, "memory")
    assert check.result == "failed"
    assert check.value == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("problem", "result", "detail"),
    [
        (EngineError("memory ran out; use less"), "failed", "the largest edit failed: memory ran out; use less"),
        (
            BackendMissingError("cuda-python is not there; install it"),
            "not run",
            "cuda-python is not there; install it",
        ),
    ],
)
def test_an_edit_that_cannot_be_measured(
    sound: Subject, monkeypatch: pytest.MonkeyPatch, problem: Exception, result: str, detail: str
) -> None:
    def fails(*_: object) -> int:
        raise problem

    monkeypatch.setattr(memory, "measured_peak", fails)
    (check,) = checked(sound, "memory")
    assert (check.result, check.detail) == (result, detail)
    assert shown(sound, "memory") == []


def test_it_is_not_run_where_it_would_say_nothing(sound: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measured_peak", lambda *_: pytest.fail("it ran"))
    assert sound.executed is not None

    def detail(subject: Subject) -> str:
        (check,) = checked(subject, "memory")
        assert check.result == "not run"
        return check.detail

    blind = replace(sound, executed=None, not_executed="no GPU here; run it elsewhere")
    assert detail(blind) == "no GPU here; run it elsewhere"
    rebuilt = replace(sound, executed=replace(sound.executed, rebuilt=True))
    assert detail(rebuilt).startswith("other engines run here than those that the plan is about; run it on ")
    old = replace(sound.bundle, manifest=replace(sound.bundle.manifest, planned_bytes=None))
    assert detail(replace(sound, bundle=old)) == (
        "the bundle does not say what memory was planned; build the bundle again with `qie build`"
    )
    monkeypatch.setattr(memory, "this_machine", lambda: replace(this_machine(), memory_gib=0.25))
    assert detail(sound) == (
        "the largest edit is planned with 0.5 GiB, and this machine has 0.2; run it on a machine with more, or lower "
        "shapes.references.max in the recipe"
    )


def test_the_process_imports_the_runtime_alone(pocket_bundle: Path) -> None:
    script = (
        "import qie.compiler.validation.measure, sys; print(sorted({'onnx', 'torch', 'skimage'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_process_that_ends_without_an_answer_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="there is no bundle .*; choose one of"):
        measure.measured_peak(tmp_path)
    killed = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: killed)
    with pytest.raises(EngineError) as caught:
        measure.measured_peak(tmp_path)
    assert str(caught.value) == (
        "the process with the largest edit ended with code -9 (no word); free memory, or lower shapes.batch.max or "
        "shapes.references.max in the recipe"
    )


def test_a_gpu_without_its_bindings_is_not_measured(pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    on_gpu = [replace(e, compute_capability="8.9") for e in open_bundle(pocket_bundle).manifest.engines]
    editor = SimpleNamespace(stages=SimpleNamespace(engines={e.component: (e,) for e in on_gpu}))

    class Opened:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> SimpleNamespace:
            return editor

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(measure, "Editor", Opened)
    monkeypatch.setattr(measure, "find_spec", lambda _: None)
    measure.main([str(pocket_bundle)], lines.append)
    answer = json.loads(lines[0])
    assert answer["unknown"].startswith("cuda-python is not installed")


def test_the_peak_of_a_gpu_is_what_an_edit_adds_to_what_is_in_use(
    pocket_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1000 bytes 300 are in use before; the edit takes 500 more, and gives all but 100 back."""
    free = iter([700, 600, 200, 600])
    on_gpu = {e.component: (replace(e, compute_capability="8.9"),) for e in open_bundle(pocket_bundle).manifest.engines}
    chosen: list[object] = []

    class OnGpu(Editor):
        def edit(self, request: Request, *, progress: Progress = no_progress, **_: object) -> Edit:
            assert len(request.images) == 3
            assert not self.encoder_cache.keeps
            progress("vision", 0, 1)
            progress("vision", 1, 1)
            return cast(Edit, None)

        def __enter__(self) -> "OnGpu":
            self.stages.engines = on_gpu
            return self

    monkeypatch.setattr(measure, "Editor", OnGpu)
    monkeypatch.setattr(measure, "find_spec", lambda _: True)
    monkeypatch.setattr(measure, "choose_gpu", lambda *words: chosen.append(words[1:]) or SimpleNamespace(index=2))
    monkeypatch.setattr(measure.cuda, "use", chosen.append)
    monkeypatch.setattr(measure.cuda, "memory", lambda: (next(free), 1000))
    lines: list[str] = []
    measure.main([str(pocket_bundle)], lines.append)
    assert json.loads(lines[0]) == {"bytes": 500}
    assert chosen == [("8.9", None), 2]
