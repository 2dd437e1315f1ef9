"""The stages: arrays in and out, engines loaded when needed, and everything released."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import BundleError, EngineError, EngineMismatchError
from qie.engines.inputs.prepare import prepare
from qie.engines.inputs.prompt import PREFIX_TOKENS, encode
from qie.engines.inputs.vision import vision_inputs
from tests.support.editors import uncached_editor
from tests.support.fake_gpu import Gpu

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8))
REQUEST = Request(images=[IMAGE], instructions=["make it red"], seeds=[1], steps=1)


def test_shapes_and_types(bundle: Path) -> None:
    with uncached_editor(bundle) as editor:
        stages, model = editor.stages, editor.model
        prepared = prepare(IMAGE, model.areas)
        inputs = vision_inputs([prepared.vision], model.vision)
        tokens = encode(editor.tokenizer, ["make it red"], inputs.grids, model.prompt)
        image_embeds = stages.vision(inputs)
        (embeds,) = stages.language([tokens], image_embeds)
        height, width, _ = prepared.vae.shape
        first, second = stages.encode([prepared.vae, prepared.vae[:, :96]])
        images = stages.decode([first, second])
    assert image_embeds.shape == (len(inputs.raster_index), embeds.shape[-1])
    assert embeds.shape[:2] == (1, tokens.lengths[0] - PREFIX_TOKENS)
    assert first.shape == (height // 16, width // 16, 64)
    assert second.shape == (height // 16, 6, 64)
    assert [image.shape for image in images] == [(height, width, 3), (height, 96, 3)]
    assert {array.dtype for array in (image_embeds, embeds, first)} == {np.dtype(np.float32)}
    assert images[0].dtype == np.uint8


def test_progress_counts_the_runs_of_a_stage(bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    stages = Stages(open_bundle(bundle))
    stages.encode([np.zeros((64, 64, 3), np.uint8)] * 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    stages.close()


@pytest.mark.parametrize(("residency", "loaded"), [("resident", ("vae_encoder",)), ("sequential", ())])
def test_a_stage_loads_its_engine_alone(bundle: Path, residency: str, loaded: tuple[str, ...]) -> None:
    stages = Stages(open_bundle(bundle), residency=residency)
    assert stages.loaded == ()
    stages.encode([np.zeros((64, 64, 3), np.uint8)])
    assert stages.loaded == loaded
    with stages.session("vae_decoder"):
        assert stages.loaded == (*loaded, "vae_decoder")
    stages.close()
    stages.close()
    assert stages.loaded == ()


# The editor that owns them


def test_an_editor_takes_a_bundle_a_name_a_folder_or_the_newest(bundle: Path, qie_home: Path) -> None:
    (qie_home / "bundles").mkdir()
    (qie_home / "bundles" / "mine").symlink_to(bundle)
    expected = open_bundle(bundle).manifest
    for which in (open_bundle(bundle), bundle, str(bundle), "mine", Path("mine"), None):
        assert Editor(which).bundle.manifest == expected
    with pytest.raises(BundleError, match="no bundle 'other'"):
        Editor("other")


def test_an_editor_closes_what_it_opened(bundle: Path) -> None:
    with uncached_editor(bundle, residency="resident") as editor:
        editor.edit(REQUEST)
        assert editor.stages.loaded == COMPONENTS
    assert editor.stages.loaded == ()
    editor.close()
    editor.close()


def test_an_editor_is_closed_with_the_last_reference_to_it(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu()
    gpu.install(monkeypatch, "tensorrt")
    editor = uncached_editor(gpu.retarget(bundle, tmp_path / "gpu", "tensorrt"))
    editor.edit(REQUEST)
    assert gpu.in_use > 0
    del editor
    assert gpu.in_use == 0


def test_an_editor_runs_on_the_gpu_that_was_chosen(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(count=2)
    gpu.install(monkeypatch, "tensorrt")
    folder = gpu.retarget(bundle, tmp_path / "gpu", "tensorrt")
    for chosen, expected in ((None, 0), (1, 1)):
        with uncached_editor(folder, device=chosen) as editor:
            editor.edit(REQUEST)
            assert editor.stages.device is not None
            assert editor.stages.device.gpu.index == gpu.device == expected
    with pytest.raises(EngineMismatchError, match="there is no GPU 2"):
        Editor(folder, device=2)


def test_a_failure_of_one_engine_does_not_keep_the_others(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every session is closed, then the failure is raised."""
    closed: list[str] = []

    class Session:
        def __init__(self, component: str) -> None:
            self.component = component

        def close(self) -> None:
            closed.append(self.component)
            if self.component == "vision":
                raise EngineError("the GPU failed; try again")

    monkeypatch.setattr("qie.engines.sessions.load.load", lambda folder, engine, *_: Session(engine.component))
    stages = Stages(open_bundle(bundle))
    for component in COMPONENTS:
        with stages.session(component):
            pass
    with pytest.raises(EngineError, match="the GPU failed"):
        stages.close()
    assert sorted(closed) == sorted(COMPONENTS)
    assert stages.loaded == ()


SCRIPT = """
import sys
from PIL import Image
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import QieError
editor = Editor(sys.argv[1])
editor.edit(Request(images=[Image.new("RGB", (90, 90))], instructions=["x"], seeds=[1], steps=1))
try:
    half_made = Editor("nope")
except QieError:
    kept = sys.exc_info()
"""


def test_the_interpreter_ends_quietly_with_an_open_editor(bundle: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(bundle)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
