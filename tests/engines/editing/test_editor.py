"""The editor: what an edit gives, in which order, with how many passes, and what stays loaded meanwhile."""

import gc
import shutil
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import COMPONENTS, EngineRecord, ProfileRecord
from qie.engines.editing import edit as edit_module
from qie.engines.editing.denoise import StepState
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Edit, Request
from qie.engines.errors import BundleError, EngineError, RequestError
from qie.engines.inputs.rotary import noise_latents
from qie.engines.inputs.schedule import sigmas
from qie.engines.sessions.load import load as load_session
from qie.engines.sessions.session import Session
from tests.support.editors import uncached_editor
from tests.support.images import smooth_image

INSTRUCTIONS = ["make it red", "replace the cat with a dog in winter", "add snow"]
SEEDS = [3, 4, 5]


IMAGE = smooth_image(150, 90)


class Watched:
    """A session that counts its runs and remembers the shapes that it was given."""

    def __init__(self, session: Session, log: "Log", engine: EngineRecord) -> None:
        self._session, self._log, self._component = session, log, engine.component
        self.closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def close(self) -> None:
        self.closed = True

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._log.runs[self._component] += 1
        self._log.batches.append((self._component, next(iter(inputs.values())).shape()[0]))
        self._session.run(inputs, outputs)


class Log:
    """What was loaded, run and released; ``alive`` are the components loaded when each was loaded."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.alive: dict[str, list[str]] = {}
        self.runs: Counter[str] = Counter()
        self.batches: list[tuple[str, int]] = []
        self._sessions: dict[str, weakref.ref[Watched]] = {}

    def load(self, folder: Path, engine: EngineRecord, *more: Any) -> Session:
        gc.collect()
        self.alive[engine.component] = self.loaded()
        self.loads.append(engine.component)
        session = Watched(load_session(folder, engine, *more), self, engine)
        self._sessions[engine.component] = weakref.ref(session)
        return session

    def loaded(self) -> list[str]:
        sessions = {component: session() for component, session in self._sessions.items()}
        return [component for component, session in sessions.items() if session is not None and not session.closed]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr("qie.engines.sessions.load.load", log.load)
    return log


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(str(bundle))


@pytest.fixture(scope="module")
def editor(opened: Bundle) -> Editor:
    return uncached_editor(opened)


def request(**changes: Any) -> Request:
    return replace(Request(images=[IMAGE], instructions=["make it red"], seeds=[3], steps=2), **changes)


def changed(opened: Bundle, **changes: Any) -> Bundle:
    """The same bundle with other defaults or limits in its manifest."""
    manifest = opened.manifest
    for part, values in changes.items():
        manifest = replace(manifest, **{part: replace(getattr(manifest, part), **values)})
    return replace(opened, manifest=manifest)


def same(one: Edit, other: Edit) -> bool:
    return len(one.images) == len(other.images) and all(map(np.array_equal, one.images, other.images))


# Batches


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("size", [None, (96, 48)])
def test_a_batch_gives_what_its_members_give_alone(
    editor: Editor, guidance: float, size: tuple[int, int] | None
) -> None:
    """To the last bit: instructions of different lengths, several seeds, more samples than fit a batch."""
    common = {"images": [IMAGE, smooth_image(60, 80, 1)], "guidance": guidance, "size": size}
    together = editor.edit(request(instructions=INSTRUCTIONS, seeds=SEEDS, **common))
    pairs = [(instruction, seed) for instruction in INSTRUCTIONS for seed in SEEDS]
    assert together.samples == tuple(pairs)
    for image, (instruction, seed) in zip(together.images, pairs, strict=True):
        alone = editor.edit(request(instructions=[instruction], seeds=[seed], **common))
        assert np.array_equal(alone.images[0], image)
    assert len({image.tobytes() for image in together.images}) == len(pairs)


def test_prompts_of_one_length_share_a_batch_up_to_the_limit(opened: Bundle, log: Log) -> None:
    editor = uncached_editor(changed(opened, limits={"batch_max": 3}))
    two_lengths = ["make it red", "add snow", "make it blue"]
    editor.edit(request(instructions=two_lengths, seeds=[1, 2], steps=1, guidance=1.0))
    assert [size for component, size in log.batches if component == "transformer"] == [2, 3, 1]
    assert [size for component, size in log.batches if component == "vae_decoder"] == [1] * 6
    assert log.runs["language"] == 3
    assert log.runs["vision"] == log.runs["vae_encoder"] == 1


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_limit_of_a_batch_changes_nothing(opened: Bundle, editor: Editor, most: int) -> None:
    wanted = request(instructions=INSTRUCTIONS[:2], seeds=SEEDS)
    assert same(uncached_editor(changed(opened, limits={"batch_max": most})).edit(wanted), editor.edit(wanted))


# Passes


@pytest.mark.parametrize(("guidance", "passes"), [(4.0, 2), (1.1, 2), (1.0, 1), (0.0, 1), (-3.0, 1)])
def test_guidance_decides_the_passes_of_a_step(opened: Bundle, log: Log, guidance: float, passes: int) -> None:
    edit = uncached_editor(opened).edit(request(steps=3, guidance=guidance))
    assert log.runs["transformer"] == 3 * passes
    assert log.runs["language"] == passes  # the negative prompt is encoded only where it counts
    assert edit.guidance == guidance


def test_the_negative_prompt_counts_with_guidance_alone(editor: Editor) -> None:
    for guidance, counts in ((4.0, True), (1.0, False)):
        plain = editor.edit(request(guidance=guidance))
        steered = editor.edit(request(guidance=guidance, negative="winter"))
        assert same(plain, steered) != counts


def test_an_observer_sees_every_step_and_changes_nothing(editor: Editor, opened: Bundle) -> None:
    seen: list[StepState] = []
    wanted = request(steps=4)
    observed = editor.edit(wanted, observer=seen.append)
    assert same(observed, editor.edit(wanted))
    assert [state.step for state in seen] == [0, 1, 2, 3]
    spec = opened.manifest.model.scheduler
    noise_tokens = observed.size.area // 256
    schedule = sigmas(spec, steps=4, noise_tokens=noise_tokens)
    assert [state.sigma for state in seen] == [float(s) for s in schedule[:-1]]
    start = noise_latents([3], observed.size.height, observed.size.width, 16, "float32")
    assert np.array_equal(seen[0].latents, start)
    for state in seen:
        assert state.latents.shape == state.velocity.shape == (1, noise_tokens, 64)
        assert state.negative_velocity is not None
    assert not np.array_equal(seen[0].latents, seen[-1].latents)  # copies, not one array seen four times


def test_an_observer_without_guidance(editor: Editor) -> None:
    """One step is latents + velocity * (sigma of the next step - sigma)."""
    seen: list[StepState] = []
    editor.edit(request(steps=3, guidance=1.0), observer=seen.append)
    for now, following in pairwise(seen):
        assert now.negative_velocity is None
        step = np.float32(following.sigma) - np.float32(now.sigma)
        np.testing.assert_allclose(following.latents, now.latents + step * now.velocity, rtol=0, atol=1e-5)


# Residency


def test_resident_engines_are_loaded_once(opened: Bundle, log: Log) -> None:
    editor = uncached_editor(opened)
    assert log.loads == []
    editor.edit(request())
    editor.edit(request(instructions=INSTRUCTIONS, seeds=SEEDS))
    assert log.loads == list(COMPONENTS)
    assert log.loaded() == list(COMPONENTS)


def test_sequential_engines_are_loaded_one_at_a_time(opened: Bundle, editor: Editor, log: Log) -> None:
    """Each once an edit, however many prompts and references there are, and gone before the next one."""
    sequential = uncached_editor(changed(opened, defaults={"residency": "sequential"}))
    wanted = request(images=[IMAGE, smooth_image(60, 80, 1)], instructions=INSTRUCTIONS[:1], seeds=SEEDS)
    edit = sequential.edit(wanted)
    assert log.loads == list(COMPONENTS)
    assert all(alive == [] for alive in log.alive.values()), log.alive
    gc.collect()
    assert log.loaded() == []
    assert same(edit, editor.edit(wanted))


def test_a_failed_edit_releases_sequential_engines(opened: Bundle, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise EngineError("no memory")

    monkeypatch.setattr(edit_module, "denoise", fail)
    sequential = uncached_editor(opened, residency="sequential")
    with pytest.raises(EngineError, match="no memory"):
        sequential.edit(request())
    gc.collect()
    assert log.loaded() == []


# Sizes, defaults, seeds


def test_what_is_not_asked_for_comes_from_the_manifest(opened: Bundle) -> None:
    editor = uncached_editor(changed(opened, defaults={"steps": 3, "guidance": 1.0}))
    edit = editor.edit(Request(images=[IMAGE], instructions=["make it red"]))
    assert (edit.steps, edit.guidance) == (3, 1.0)
    ((instruction, seed),) = edit.samples
    assert instruction == "make it red"
    assert 0 <= seed < 2**32
    assert same(edit, editor.edit(Request(images=[IMAGE], instructions=["make it red"], seeds=[seed])))
    assert set(edit.seconds) == {"vision", "language", "encode", "modulation", "denoise", "decode"}


def test_the_last_image_gives_the_size(editor: Editor) -> None:
    edit = editor.edit(request(images=[IMAGE, smooth_image(90, 150)]))
    assert str(edit.size) == "96x160"
    assert edit.images[0].size == (96, 160)
    assert edit.images[0].mode == "RGB"
    assert edit.notes == ()


@pytest.mark.parametrize(
    ("size", "made", "note"),
    [((64, 128), (64, 128), None), ((70, 130), (64, 128), "multiples of 16"), ((512, 512), (128, 128), "bucket")],
)
def test_sizes(editor: Editor, size: tuple[int, int], made: tuple[int, int], note: str | None) -> None:
    edit = editor.edit(request(size=size))
    assert (edit.size.width, edit.size.height) == made
    assert edit.images[0].size == made
    assert (note is None) == (len(edit.notes) == 1)
    assert note is None or note in edit.notes[0]
    assert f"the image is encoded at 160x96 and the result is {edit.size}" in edit.notes[-1]


@pytest.mark.parametrize("size", [None, (64, 64)])
def test_match_input(editor: Editor, size: tuple[int, int] | None) -> None:
    edit = editor.edit(request(match_input=True, size=size))
    plain = editor.edit(request(size=size))
    assert edit.images[0].size == (150, 90)
    assert plain.size == edit.size
    resized = plain.images[0].resize((150, 90), Image.Resampling.LANCZOS)
    assert np.array_equal(edit.images[0], np.asarray(resized))


def test_noise_can_be_given(editor: Editor) -> None:
    """Noise of a seed in place of the seed is the same edit; other noise is another."""
    noise: NDArray[np.float32] = noise_latents([3], 96, 160, 16, "float32")
    assert same(editor.edit(request(noise=noise)), editor.edit(request()))
    assert same(editor.edit(request(noise=noise, seeds=[99])), editor.edit(request()))
    assert not same(editor.edit(request(noise=-noise)), editor.edit(request()))


def test_the_noise_has_the_dtype_of_the_manifest(opened: Bundle, editor: Editor) -> None:
    edit = uncached_editor(changed(opened, defaults={"noise": "bfloat16"})).edit(request())
    noise: NDArray[np.float32] = noise_latents([3], 96, 160, 16, "bfloat16")
    assert same(edit, editor.edit(request(noise=noise)))


def test_progress(editor: Editor) -> None:
    """Every kind of work runs from 0 to its total and never backwards."""
    seen: dict[str, list[tuple[int, int]]] = {}
    editor.edit(
        request(instructions=INSTRUCTIONS, seeds=SEEDS, steps=3),
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert list(seen) == ["vision", "language", "encode", "modulation", "denoise", "decode"]
    for what, steps in seen.items():
        assert steps == sorted(steps), what
        assert len({total for _, total in steps}) == 1, what
        assert steps[-1][0] == steps[-1][1], what


# What is refused


FOUR, THIN = [IMAGE] * 4, [Image.new("RGB", (3000, 5))]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": []}, "there is no image, expected at least 1"),
        ({"images": FOUR}, "4 images were given, this bundle takes at most 3"),
        ({"instructions": []}, "there is no instruction"),
        ({"instructions": ["make it red", ""]}, "instruction is empty; describe"),
        ({"instructions": ["\ud800"]}, "not UTF-8"),
        ({"negative": "\udfff"}, "not UTF-8"),
        ({"seeds": []}, "there is no seed"),
        ({"seeds": [1, 2**64]}, "18446744073709551616"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": 1001}, "steps is 1001, expected at most 1000; use fewer"),
        ({"guidance": float("nan")}, "nan"),
        ({"guidance": float("inf")}, "inf"),
        ({"size": (0, 64)}, "0x64"),
        ({"images": THIN}, "too narrow"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_an_engine_is_loaded(opened: Bundle, log: Log, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        uncached_editor(opened).edit(request(**changes))
    assert log.loads == []


def test_a_prompt_that_the_engines_do_not_take(opened: Bundle, log: Log) -> None:
    editor = uncached_editor(changed(opened, limits={"prompt_tokens_max": 40}))
    with pytest.raises(RequestError, match=r"a prompt has \d+ tokens .* at most 40; shorten"):
        editor.edit(request(instructions=["make it red " * 20]))
    assert log.loads == []


def test_an_image_that_the_encoder_does_not_take(opened: Bundle, log: Log) -> None:
    def bound(engine: EngineRecord) -> EngineRecord:
        if engine.component != "vae_encoder":
            return engine
        profile = ProfileRecord(input="image", min=(1, 64, 64, 3), opt=(1, 96, 96, 3), max=(1, 128, 128, 3))
        return replace(engine, profiles=(profile,))

    manifest = opened.manifest
    narrow = replace(opened, manifest=replace(manifest, engines=tuple(map(bound, manifest.engines))))
    editor = uncached_editor(narrow)
    assert editor.edit(request(images=[smooth_image(90, 80)])).images
    log.runs.clear()
    with pytest.raises(RequestError, match=r"image 2 would be encoded at \d+x\d+ pixels.* from 64 to 128; crop"):
        editor.edit(request(images=[smooth_image(90, 80), smooth_image(400, 40)]))
    assert not log.runs


def test_the_first_generation_takes_one_image(edit_bundle: Path) -> None:
    editor = uncached_editor(open_bundle(str(edit_bundle)))
    assert editor.edit(request()).images[0].size == (160, 96)
    with pytest.raises(RequestError, match="2 images were given, this bundle takes at most 1"):
        editor.edit(request(images=[IMAGE, IMAGE]))


def test_a_damaged_tokenizer(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bad")
    file = tmp_path / "bad" / "tokenizer.json"
    file.write_bytes(b"{" * file.stat().st_size)
    with pytest.raises(BundleError, match="tokenizer.json is damaged; build the bundle again"):
        open_bundle(tmp_path / "bad")
