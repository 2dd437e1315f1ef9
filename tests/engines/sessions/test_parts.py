"""Components in parts: edits with several engines a component equal those with one, on the CPU and on a fake GPU."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import EngineRecord, Residency
from qie.engines.editing.denoise import StepState
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import BundleError
from qie.engines.sessions.choose import choose_engines
from tests.support.bundles import build, in_hub_cache
from tests.support.damage import change_manifest
from tests.support.editors import uncached_editor
from tests.support.fake_gpu import Gpu
from tests.support.images import smooth_image

RECIPE = """extends = "cpu"
[components.transformer]
parts = 2
[components.language]
parts = 2
[shapes]
batch = { max = 4 }
"""

REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"negative": "blurry, dark, without a cat"},
    "not guided": {"guidance": 1.0},
    "batches": {"instructions": ["make it red", "add snow and a dog"], "seeds": [1, 2]},
}


def request(**changes: Any) -> Request:
    base = Request(images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[3], steps=3, guidance=4.0)
    return replace(base, **changes)


@pytest.fixture(scope="module")
def divided(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with transformer and language model in two parts each; not to be changed."""
    return build(checkpoint, tmp_path_factory.mktemp("divided") / "parts-cpu", RECIPE).path


@pytest.fixture(scope="module")
def whole(bundle: Path) -> Iterator[Editor]:
    with uncached_editor(bundle) as editor:
        yield editor


def steps_of(editor: Editor, asked: Request) -> list[StepState]:
    states: list[StepState] = []
    editor.edit(asked, observer=states.append)
    return states


def same(ours: list[StepState], theirs: list[StepState]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(np.array_equal(a.velocity, b.velocity) and np.array_equal(a.latents, b.latents) for a, b in pairs)


@pytest.mark.parametrize("name", REQUESTS)
def test_an_edit_in_parts_is_the_one_of_the_whole(divided: Path, whole: Editor, name: str) -> None:
    """Every latent and velocity, bit for bit."""
    with uncached_editor(divided) as editor:
        assert [len(parts) for parts in editor.stages.engines.values()] == [1, 2, 1, 2, 1]
        assert same(steps_of(editor, request(**REQUESTS[name])), steps_of(whole, request(**REQUESTS[name])))


def test_parts_behind_the_links_of_a_download(divided: Path, tmp_path: Path) -> None:
    with uncached_editor(in_hub_cache(divided, tmp_path)) as linked, uncached_editor(divided) as editor:
        assert same(steps_of(linked, request()), steps_of(editor, request()))


@pytest.mark.parametrize("residency", ["resident", "sequential"])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_parts_are_chained_on_the_gpu(
    divided: Path, whole: Editor, gpu: Gpu, backend: str, tmp_path: Path, residency: Residency, graphs: bool
) -> None:
    """The loop copies only what a step brings, as with one engine, and allocates hidden states in the first step."""
    folder = gpu.retarget(divided, tmp_path / "gpu", backend)
    with uncached_editor(folder, residency=residency, cuda_graphs=graphs) as editor:
        for name in (*REQUESTS, "guided"):
            assert same(steps_of(editor, request(**REQUESTS[name])), steps_of(whole, request(**REQUESTS[name]))), name
        gpu.log.clear()
        editor.edit(request(steps=6))
    names = [f"{name} {detail}" if name == "queue" else name for name, detail in gpu.log]
    runs = [index for index, name in enumerate(names) if name == "queue run transformer"]
    done = Counter(names[runs[3] + 1 : runs[-1] + 1])  # behind the first step: two passes of two parts
    assert len(runs) == 6 * 2 * 2
    allowed = {"queue run transformer", "queue mark", "queue copy on device", "wait", "launch", "context"}
    assert set(done) <= allowed | {"serialize cache"}, done
    assert done["queue copy on device"] == 5 * 2
    assert gpu.blocks == {} and gpu.in_use == 0 and gpu.crashes == []


def test_no_more_hidden_states_are_kept_than_two_passes_have(
    divided: Path, gpu: Gpu, backend: str, tmp_path: Path
) -> None:
    """Three of the transformer: both passes share that of the images; and two of the language model."""
    folder = gpu.retarget(divided, tmp_path / "gpu", backend)
    counts = []
    with uncached_editor(folder, residency="resident") as editor:
        for words in ("a", "a b c", "a b c d e f g"):
            editor.edit(request(negative=words))
            counts.append(len(gpu.blocks))
    assert counts[1] == counts[2]


def test_a_part_that_cannot_be_loaded_leaves_none(divided: Path, gpu: Gpu, backend: str, tmp_path: Path) -> None:
    folder = gpu.retarget(divided, tmp_path / "gpu", backend)
    stages = Stages(open_bundle(folder))
    engine = folder / "transformer.1.engine"
    engine.write_text("{" + " " * (engine.stat().st_size - 1))
    with pytest.raises(BundleError, match="transformer.1.engine"), stages.session("transformer"):
        pass
    assert stages.loaded == ()
    stages.close()
    assert gpu.blocks == {} and gpu.in_use == 0


# Choosing


def changed(bundle: Path, keep: Any) -> Bundle:
    opened = open_bundle(bundle)
    engines = tuple(engine for engine in opened.manifest.engines if keep(engine))
    return replace(opened, manifest=replace(opened.manifest, engines=engines))


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_is_missing(divided: Path, part: int) -> None:
    lacking = changed(divided, lambda engine: (engine.component, engine.part) != ("transformer", part))
    problem = f"lacks part {part + 1} of transformer for onnxruntime/cpu; build it again with `qie build`"
    with pytest.raises(BundleError, match=problem):
        choose_engines(lacking)


def test_parts_of_one_target_belong_together(divided: Path) -> None:
    """An incomplete component for another backend does not get parts of this one."""
    opened = open_bundle(divided)
    others = [
        replace(engine, backend="abacus") for engine in opened.manifest.engines if engine.component == "transformer"
    ]
    mixed = replace(opened, manifest=replace(opened.manifest, engines=(others[0], *opened.manifest.engines)))
    chosen = choose_engines(mixed)["transformer"]
    assert [(engine.backend, engine.part) for engine in chosen] == [("onnxruntime", 0), ("onnxruntime", 1)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"part": 0}, "transformer has two engines of one part"),
        ({"inputs": ()}, "transformer has no tensor "),
        ({"outputs": ()}, None),
    ],
)
def test_a_manifest_whose_parts_do_not_fit(
    divided: Path, tmp_path: Path, changes: dict[str, Any], problem: str | None
) -> None:
    folder = Path(shutil.copytree(divided, tmp_path / "bundle"))
    engines = json.loads((folder / "manifest.json").read_text())["engines"]
    last = next(e for e in engines if (e["component"], e["part"]) == ("transformer", 1))
    last |= {key: list(value) if isinstance(value, tuple) else value for key, value in changes.items()}
    change_manifest(folder, engines=engines)
    with pytest.raises(BundleError, match=problem or "lacks part 3 of transformer"):
        choose_engines(open_bundle(folder))


def test_the_identity_of_a_component_is_that_of_all_its_parts(divided: Path) -> None:
    stages = Stages(open_bundle(divided))
    record: EngineRecord = stages.engines["transformer"][1]
    other = {**stages.engines, "transformer": (stages.engines["transformer"][0], replace(record, key="0" * 64))}
    assert stages.identity("transformer") != Stages(open_bundle(divided), other).identity("transformer")
    assert stages.identity("vision") == Stages(open_bundle(divided), other).identity("vision")
