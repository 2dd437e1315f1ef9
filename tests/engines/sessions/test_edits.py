"""Whole edits on a fake GPU: the same bytes as on the CPU, and the order of work."""

import gc
import json
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.bfloat16 import round_to_bfloat16
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import COMPONENTS, Residency
from qie.engines.editing import edit as edit_module
from qie.engines.editing import stages as stages_module
from qie.engines.editing.denoise import StepState
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Edit, Request
from qie.engines.errors import BundleError, EngineError
from qie.engines.inputs.modulation import Tables
from qie.engines.inputs.schedule import sigmas
from tests.support.editors import uncached_editor
from tests.support.fake_gpu import Code, Gpu, need
from tests.support.images import smooth_image

STEPS = 4


REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {},
    "not guided": {"guidance": 1.0},
    "one step": {"steps": 1},
    "two images": {"images": [smooth_image(150, 90), smooth_image(60, 80, 1)]},
    "another size": {"size": (96, 48)},
    "a batch": {"seeds": [1, 2, 3]},
    "batches": {"instructions": ["make it red", "add snow and a dog"], "seeds": [1, 2, 3, 4, 5]},
    "a long negative prompt": {"negative": "blurry, dark, without a cat"},
}


def request(**changes: Any) -> Request:
    base = Request(images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[3], steps=STEPS, guidance=4.0)
    return replace(base, **changes)


def same(one: Edit, other: Edit) -> bool:
    return len(one.images) == len(other.images) and all(map(np.array_equal, one.images, other.images))


@pytest.fixture(scope="module")
def on_cpu(bundle: Path) -> Editor:
    return uncached_editor(open_bundle(str(bundle)))


@pytest.fixture
def folder(gpu: Gpu, bundle: Path, tmp_path: Path, backend: str) -> Path:
    return gpu.retarget(bundle, tmp_path / "gpu", backend)


def editor_of(folder: Path, **options: Any) -> Editor:
    return uncached_editor(open_bundle(str(folder)), **options)


def loop_of(gpu: Gpu) -> list[str]:
    """What the host did from the first run of the transformer to the last one, runs included."""
    names = [f"{name} {detail}" if name == "queue" else name for name, detail in gpu.log]
    runs = [index for index, name in enumerate(names) if name == "queue run transformer"]
    return names[runs[0] : runs[-1] + 1]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("name", REQUESTS)
def test_an_edit_is_the_processors(folder: Path, on_cpu: Editor, gpu: Gpu, name: str, graphs: bool) -> None:
    editor = editor_of(folder, cuda_graphs=graphs)
    edit = editor.edit(request(**REQUESTS[name]))
    expected = on_cpu.edit(request(**REQUESTS[name]))
    assert same(edit, expected)
    assert np.std(edit.images[0]) > 5  # a flat image would prove nothing
    assert bool(gpu.captures) == (graphs and name != "one step")
    editor.close()
    assert gpu.in_use == 0
    assert gpu.blocks == {}


def test_edits_after_one_another(folder: Path, on_cpu: Editor) -> None:
    """Contexts, arena and graphs of one edit do not reach into the next."""
    editor = editor_of(folder)
    for name in (*REQUESTS, "guided"):
        assert same(editor.edit(request(**REQUESTS[name])), on_cpu.edit(request(**REQUESTS[name]))), name


def test_an_observer_sees_the_same_steps(folder: Path, on_cpu: Editor) -> None:
    states: list[StepState] = []
    expected: list[StepState] = []
    editor_of(folder).edit(request(), observer=states.append)
    on_cpu.edit(request(), observer=expected.append)
    assert len(states) == STEPS
    for ours, theirs in zip(states, expected, strict=True):
        assert (ours.step, ours.sigma) == (theirs.step, theirs.sigma)
        assert np.array_equal(ours.latents, theirs.latents)
        assert np.array_equal(ours.velocity, theirs.velocity)
        assert ours.negative_velocity is not None and theirs.negative_velocity is not None
        assert np.array_equal(ours.negative_velocity, theirs.negative_velocity)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_the_loop_touches_nothing_of_the_hosts(folder: Path, gpu: Gpu, graphs: bool, guidance: float) -> None:
    """No copy from or to the host, no memory asked for, no wait for a step's own result: the GPU always has work."""
    editor_of(folder, cuda_graphs=graphs).edit(request(guidance=guidance, steps=6))
    done = Counter(loop_of(gpu))
    allowed = {"queue run transformer", "queue mark", "queue copy on device", "wait", "launch", "context"}
    allowed |= {"serialize cache"}  # after the first run
    assert set(done) <= allowed, done
    assert done["queue run transformer"] == 6 * (2 if guidance > 1 else 1)
    assert done["queue copy on device"] == 5 * 2  # latents, and which step it is
    assert gpu.starved == 0
    assert gpu.deepest == 2


def test_a_step_brings_its_number_alone(folder: Path, gpu: Gpu) -> None:
    editor = editor_of(folder)

    def uploads(steps: int, batches: int) -> int:
        gpu.log.clear()
        editor.edit(request(seeds=list(range(4 * batches)), steps=steps))
        return gpu.log.count(("queue", "copy to device"))

    assert uploads(8, 1) - uploads(2, 1) == 6
    assert uploads(8, 3) - uploads(2, 3) == 3 * 6  # of each batch; the schedule is uploaded once for all


def test_a_schedule_stays_on_the_gpu_for_the_next_edit(
    folder: Path, gpu: Gpu, on_cpu: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    inner = edit_module.modulation_tables
    monkeypatch.setattr(edit_module, "modulation_tables", lambda *a, **k: read.append(1) or inner(*a, **k))
    resident, sequential = editor_of(folder, residency="resident"), editor_of(folder, residency="sequential")
    for editor, reads in ((resident, 3), (sequential, 4)):
        read.clear()
        for steps in (4, 4, 6, 4):
            assert same(editor.edit(request(steps=steps)), on_cpu.edit(request(steps=steps)))
        assert len(read) - 4 == reads, "the edits on the CPU read theirs every time"
        editor.close()
    assert gpu.blocks == {}


def test_tables_in_bfloat16_go_to_the_gpu_as_they_are_stored(
    folder: Path, gpu: Gpu, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes, and the same edit as with tables rounded to bfloat16."""

    def rounded(*arguments: Any, **options: Any) -> Tables:
        tables = inner(*arguments, **options)
        return Tables(blocks=round_to_bfloat16(tables.blocks), out=round_to_bfloat16(tables.out))

    opened = open_bundle(str(folder))
    record = next(e for e in opened.manifest.engines if e.component == "transformer")
    specs = tuple(replace(s, dtype="bfloat16") if s.name.startswith("modulation") else s for s in record.inputs)
    object.__setattr__(record, "inputs", specs)
    description = json.loads((folder / record.path).read_text())
    description["inputs"] = [
        [name, "bfloat16" if name.startswith("modulation") else dtype, dims]
        for name, dtype, dims in description["inputs"]
    ]
    (folder / record.path).write_text(json.dumps(description))
    with uncached_editor(opened) as editor:
        edit = editor.edit(request())
        uploaded = editor.stages.schedule(sigmas(editor.model.scheduler, steps=STEPS, noise_tokens=edit.size.tokens))
        assert uploaded is not None
        assert {tensor.dtype.name for name, tensor in uploaded.inputs.items() if name != "dsigma"} == {"uint16"}
        uploaded = None
    inner = edit_module.modulation_tables
    monkeypatch.setattr(edit_module, "modulation_tables", rounded)
    assert same(edit, uncached_editor(open_bundle(str(bundle))).edit(request()))


def test_the_next_engines_file_is_read_while_one_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: Editor
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(stages_module, "read_ahead", lambda path: asked.append(path.name))
    editor = editor_of(folder)
    for _ in range(2):
        editor.edit(request())
    assert asked == [f"{component}.engine" for component in COMPONENTS[1:]]
    on_cpu.edit(request())
    assert len(asked) == len(COMPONENTS) - 1
    editor.close()


def test_what_the_images_say_is_uploaded_once_for_all_prompts(folder: Path, gpu: Gpu) -> None:
    editor = editor_of(folder)

    def uploads(*instructions: str) -> int:
        gpu.log.clear()
        editor.edit(request(instructions=instructions, guidance=1.0))
        return gpu.log.count(("queue", "copy to device"))

    uploads("make it red")  # the schedule, which stays
    ids, places_of_images, positions, latents_to_decode = 1, 1, 1, 1
    more = ids + places_of_images + positions + latents_to_decode
    assert uploads("make it red", "make it blue") - uploads("make it red") == more


def test_one_graph_a_pass(folder: Path, gpu: Gpu, backend: str) -> None:
    editor_of(folder, cuda_graphs=True).edit(request(steps=6))
    assert gpu.captures == ["cuda" if backend == "tensorrt" else "transformer"] * 2
    launches = sum(name == "launch" for name, _ in gpu.log)
    assert launches == (2 * 5 if backend == "tensorrt" else 0)  # the first run of a pass is a plain one


def test_one_context_a_pass_however_many_edits(folder: Path, gpu: Gpu) -> None:
    editor = editor_of(folder)
    for name in REQUESTS:
        editor.edit(request(**REQUESTS[name]))
    contexts = Counter(detail for name, detail in gpu.log if name == "context")
    assert contexts == {component: 2 if component == "transformer" else 1 for component in COMPONENTS}


@pytest.mark.parametrize("residency", ["resident", "sequential"])
def test_the_arena_is_reserved_once_for_the_largest_of_the_five(folder: Path, gpu: Gpu, residency: Residency) -> None:
    """The bundle says how much each engine needs, so the first one reserves for all."""
    needs = []
    for record in (bundle := open_bundle(str(folder))).manifest.engines:
        limits = {profile.input: profile.max for profile in record.profiles}
        needs.append(need({spec.name: limits.get(spec.name, spec.dims) for spec in record.inputs}))
        object.__setattr__(record, "activation_bytes", needs[-1])
    editor = uncached_editor(bundle, residency=residency)
    editor.edit(request())
    assert editor.stages.device is not None
    assert len(set(needs)) == len(COMPONENTS)
    assert editor.stages.device.arena.size == max(needs)
    assert [size for name, size in gpu.log if name == "malloc" and size in needs] == [max(needs)]


def test_resident_engines_stay(folder: Path, gpu: Gpu) -> None:
    editor = editor_of(folder)
    editor.edit(request())
    held = gpu.in_use
    editor.edit(request())
    assert Counter(detail for name, detail in gpu.log if name == "load") == dict.fromkeys(COMPONENTS, 1)
    assert gpu.in_use <= held + 64  # nothing grows from edit to edit
    editor.edit(request())
    assert gpu.in_use <= held + 64


def test_sequential_engines_take_turns(gpu: Gpu, bundle: Path, tmp_path: Path, backend: str, on_cpu: Editor) -> None:
    """The GPU holds one engine at a time, and the edit is the same."""
    weights = {e.component: sum(f.bytes for f in e.files) for e in open_bundle(str(bundle)).manifest.engines}
    resident = editor_of(gpu.retarget(bundle, tmp_path / "resident", backend))
    resident.edit(request())
    all_at_once, gpu.peak = gpu.peak, 0
    resident.close()

    gpu.peak = gpu.in_use
    gpu.log.clear()
    editor = editor_of(gpu.retarget(bundle, tmp_path / "sequential", backend, residency="sequential"))
    assert same(editor.edit(request()), on_cpu.edit(request()))
    assert [detail for name, detail in gpu.log if name == "load"] == list(COMPONENTS)
    assert gpu.peak < all_at_once - (sum(weights.values()) - max(weights.values())) * 0.9
    assert editor.stages.loaded == ()
    assert same(editor.edit(request()), on_cpu.edit(request()))


def test_a_card_that_is_too_small_for_all_engines_says_what_to_do(folder: Path, gpu: Gpu, bundle: Path) -> None:
    weights = [sum(f.bytes for f in e.files) for e in open_bundle(str(bundle)).manifest.engines]
    gpu.memory_bytes = sum(weights) // 2
    with pytest.raises(EngineError, match='residency = "sequential"'):
        editor_of(folder).edit(request())


def test_a_failure_in_the_loop_is_an_edit_error(folder: Path, gpu: Gpu) -> None:
    def fail(what: str, done: int, total: int) -> None:
        if what == "denoise" and done == 2:
            gpu.broken = Code.cudaErrorIllegalAddress

    with pytest.raises(EngineError, match="the GPU failed .cudaErrorIllegalAddress"):
        editor_of(folder).edit(request(), progress=fail)


def test_an_interrupt_in_the_loop_leaves_an_editor_that_works(folder: Path, gpu: Gpu, on_cpu: Editor) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "denoise" and done == 2:
            raise KeyboardInterrupt

    editor = editor_of(folder)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(request(), progress=interrupt)
    assert same(editor.edit(request()), on_cpu.edit(request()))


@pytest.mark.parametrize("residency", ["resident", "sequential"])
def test_an_exception_leaves_nothing_on_the_gpu(folder: Path, gpu: Gpu, residency: Residency) -> None:
    """Its frames hold tensors when the editor is closed."""

    def fail(what: str, done: int, total: int) -> None:
        if what == "denoise" and done == 2:
            raise ValueError("of the caller")

    kept = []
    for _ in range(3):
        with (
            pytest.raises(ValueError, match="of the caller") as problem,
            editor_of(folder, residency=residency) as editor,
        ):
            editor.edit(request(), progress=fail)
        kept.append(problem)
    gc.collect()
    assert gpu.blocks == {}
    assert gpu.crashes == []


def test_the_first_problem_is_the_one_that_is_told(folder: Path, gpu: Gpu) -> None:
    def fail(what: str, done: int, total: int) -> None:
        if what == "denoise" and done == 2:
            gpu.broken = Code.cudaErrorIllegalAddress
            raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"), editor_of(folder) as editor:
        editor.edit(request(), progress=fail)
    gc.collect()
    assert gpu.crashes == []


@pytest.mark.parametrize("graphs", [None, True])
def test_a_gpu_that_fails_leaves_no_context(folder: Path, gpu: Gpu, graphs: bool | None) -> None:
    def fail(what: str, done: int, total: int) -> None:
        if what == "denoise" and done == 3:
            gpu.broken = Code.cudaErrorIllegalAddress

    editor = editor_of(folder, cuda_graphs=graphs)
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        editor.edit(request(), progress=fail)
    with pytest.raises(EngineError, match="cudaErrorIllegalAddress"):
        editor.close()
    gc.collect()
    assert [reference() for reference in gpu.contexts if reference() is not None] == []
    assert [reference() for reference in gpu.engines if reference() is not None] == []
    assert gpu.crashes == []


@pytest.mark.parametrize("stage", ["vision", "language", "encode", "denoise", "decode"])
def test_an_editor_that_is_closed_in_its_own_edit_closes_when_that_ends(
    folder: Path, gpu: Gpu, on_cpu: Editor, stage: str
) -> None:
    """As a handler of a signal would."""
    editor = editor_of(folder)
    edit = editor.edit(request(), progress=lambda what, *_: editor.close() if what == stage else None)
    assert same(edit, on_cpu.edit(request()))
    assert gpu.blocks == {}
    assert editor.stages.loaded == ()
    assert same(editor.edit(request()), edit)
    editor.close()


def test_a_bundle_that_is_deleted_while_it_is_open(folder: Path, gpu: Gpu, on_cpu: Editor) -> None:
    editor = editor_of(folder)
    editor.edit(request())
    shutil.rmtree(folder)
    assert same(editor.edit(request()), on_cpu.edit(request())), "everything that it needs is loaded"
    editor.close()
    with pytest.raises(BundleError, match=r"the bundle .* cannot be read any more .*; build it again with `qie build`"):
        editor.edit(request())
    editor.close()


def test_a_closed_editor_loads_again(folder: Path, gpu: Gpu, on_cpu: Editor) -> None:
    editor = editor_of(folder)
    editor.edit(request())
    editor.close()
    assert gpu.in_use == 0
    assert same(editor.edit(request()), on_cpu.edit(request()))


@pytest.mark.parametrize("residency", ["resident", "sequential"])
def test_threads_share_an_editor(folder: Path, on_cpu: Editor, gpu: Gpu, residency: Residency) -> None:
    names = ["not guided", "one step", "another size"] * 4
    expected = {name: on_cpu.edit(request(**REQUESTS[name])) for name in set(names)}
    editor = editor_of(folder, residency=residency)
    with ThreadPoolExecutor(4) as pool:
        edits = list(pool.map(lambda name: editor.edit(request(**REQUESTS[name])), names))
    assert all(same(edit, expected[name]) for name, edit in zip(names, edits, strict=True))
    editor.close()
    assert gpu.in_use == 0
