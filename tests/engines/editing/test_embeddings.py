"""Which engines an edit runs with a cache of embeddings, and that its bytes are those without one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import Component, FileRecord, Residency
from qie.engines.cache import Cache
from qie.engines.editing.conditioning import Conditioning, condition
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.meter import Meter
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.editing.stages import Stages
from qie.engines.errors import EngineError
from qie.engines.sessions import identity as identity_module
from qie.engines.sessions.session import Session
from tests.support.editors import uncached_editor
from tests.support.fake_gpu import Gpu
from tests.support.images import smooth_image

ENCODERS = ("vision", "language")
IMAGE = smooth_image(150, 90)


class Spied(Stages):
    """Stages that note every session that is opened and every run of the encoders."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.opened: list[str] = []
        self.runs: list[str] = []
        self.fails: Callable[[list[str]], None] = lambda runs: None

    @contextmanager
    def session(self, component: Component) -> Iterator[Session]:
        self.opened.append(component)
        with super().session(component) as session:
            if component not in ENCODERS:
                yield session
                return
            spy: Any = SpiedSession(session, component, self)
            yield spy

    def taken(self) -> tuple[list[str], list[str]]:
        """The encoders that were opened and the runs since the last call."""
        seen = [name for name in self.opened if name in ENCODERS], self.runs
        self.opened, self.runs = [], []
        return seen


class SpiedSession:
    def __init__(self, session: Session, component: str, stages: Spied) -> None:
        self._session, self._component, self._stages = session, component, stages

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, inputs: Any, outputs: Any) -> None:
        self._stages.runs.append(self._component)
        self._stages.fails(self._stages.runs)
        self._session.run(inputs, outputs)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture
def editor(opened: Bundle) -> Editor:
    return spied(opened)


@pytest.fixture(scope="module")
def primed(opened: Bundle) -> EncoderCache:
    """A cache that has ``request()``; what a test adds to it, no other test asks for."""
    cache = EncoderCache()
    conditioned(spied(opened, cache), request())
    return cache


@pytest.fixture(scope="module")
def asker(opened: Bundle, primed: EncoderCache) -> Editor:
    """An editor with that cache, for tests that change nothing but the request."""
    return spied(opened, primed)


def spied(opened: Bundle, cache: EncoderCache | None = None, **options: Any) -> Editor:
    """An editor whose stages are spied on."""
    editor = Editor(opened, encoder_cache=cache)
    editor.stages = Spied(opened, **options)
    return editor


def request(instruction: str = "make it red", **changes: Any) -> Request:
    plain = Request(images=[IMAGE], instructions=[instruction], seeds=[3], steps=1, guidance=1.0, size=(64, 64))
    return replace(plain, **changes)


def conditioned(editor: Editor, wanted: Request, meter: Meter | None = None) -> Conditioning:
    settings = resolve(wanted, editor.bundle.manifest)
    cache = editor.encoder_cache
    return condition(editor.stages, editor.tokenizer, wanted, settings, meter=meter, encoder_cache=cache)


def runs(editor: Editor) -> tuple[list[str], list[str]]:
    assert isinstance(editor.stages, Spied)
    return editor.stages.taken()


def contents(conditioning: Conditioning) -> list[bytes]:
    arrays = [*conditioning.prompts, conditioning.reference]
    return [
        array.tobytes() for array in (*arrays, *([conditioning.negative] if conditioning.negative is not None else []))
    ]


# Hits and misses


def test_the_same_pair_runs_no_encoder(editor: Editor) -> None:
    first = editor.edit(request())
    assert runs(editor) == (["vision", "language"], ["vision", "language"])
    second = editor.edit(request(seeds=[4], steps=2))
    assert runs(editor) == ([], [])
    assert set(first.seconds) - set(second.seconds) == {"vision", "language"}
    assert (editor.encoder_cache.hits, editor.encoder_cache.misses) == (1, 2)


def test_what_a_server_embeds_is_not_kept(editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have other weights the next time; the bundle's vision tower has not."""
    real = editor.stages.identity
    unknown = {"language": None}
    monkeypatch.setattr(editor.stages, "identity", lambda c: unknown[c] if c in unknown else real(c))
    first = contents(conditioned(editor, request()))
    assert runs(editor)[1] == ["vision", "language"]
    assert contents(conditioned(editor, request())) == first
    assert runs(editor)[1] == ["language"]


def test_the_stages_do_not_know_a_servers_identity(opened: Bundle) -> None:
    stages = Stages(opened, vllm_url="http://127.0.0.1:9")
    assert stages.identity("language") is None
    assert stages.identity("vision") == Stages(opened).identity("vision")


def test_a_new_instruction_runs_the_language_model_alone(editor: Editor) -> None:
    editor.edit(request())
    runs(editor)
    seen: list[str] = []
    edit = editor.edit(request("make it blue"), progress=lambda stage, *_: seen.append(stage))
    assert runs(editor) == (["language"], ["language"])
    assert "vision" not in edit.seconds
    assert "language" in edit.seconds
    assert "vision" not in seen


def test_only_missing_prompts_run_and_equal_ones_run_once(editor: Editor) -> None:
    conditioned(editor, request("make it red"))
    runs(editor)
    texts = ["add snow", "make it red", "add snow", "blur it now"]
    totals: list[tuple[int, int]] = []
    meter = Meter(lambda stage, done, total: totals.append((done, total)) if stage == "language" else None)
    together = conditioned(editor, request(instructions=texts, guidance=2.0, negative="blur it now"), meter)
    assert runs(editor) == (["language"], ["language"] * 2)
    assert totals == [(0, 2), (1, 2), (2, 2)]
    with uncached_editor(editor.bundle) as uncached:
        alone = [conditioned(uncached, request(text)).prompts[0].tobytes() for text in texts]
    assert [prompt.tobytes() for prompt in together.prompts] == alone
    assert together.negative is not None
    assert together.negative.tobytes() == alone[-1]


def other_pixel(image: Image.Image) -> Image.Image:
    """One channel of one pixel of the left half is changed, by enough to survive the resizing."""
    pixels = np.array(image)
    pixels[40, 40, 1] ^= 0xC0
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"images": [other_pixel(IMAGE)]}, ["vision", "language"]),
        ({"images": [IMAGE, IMAGE]}, ["vision", "language"]),
        ({"images": [IMAGE.crop((0, 0, 150, 60))]}, ["vision", "language"]),
        ({"instructions": ["make it red "]}, ["language"]),
        ({"instructions": ["Make it red"]}, ["language"]),
        ({"guidance": 2.0}, ["language"]),
        ({"seeds": [9], "steps": 2}, []),
        ({"size": (64, 96)}, []),
    ],
)  # fmt: skip
def test_what_decides_embeddings_decides_the_key(asker: Editor, changes: dict[str, Any], expected: list[str]) -> None:
    conditioned(asker, request(**changes))
    assert runs(asker)[1] == expected


def with_engine(opened: Bundle, component: Component, **changes: Any) -> Bundle:
    engines = tuple(
        replace(engine, **changes) if engine.component == component else engine for engine in opened.manifest.engines
    )
    return replace(opened, manifest=replace(opened.manifest, engines=engines))


@pytest.mark.parametrize("component", ENCODERS)
@pytest.mark.parametrize("what", ["key", "files"])
def test_another_engine_misses(opened: Bundle, primed: EncoderCache, component: Component, what: str) -> None:
    """Also one whose key repeats with other files, as in a bundle that was edited by hand."""
    (engine,) = (e for e in opened.manifest.engines if e.component == component)
    first, *others = engine.files
    edited: tuple[FileRecord, ...] = (replace(first, sha256="0" * 64), *others)
    changes: dict[str, dict[str, Any]] = {"key": {"key": "0" * 64}, "files": {"files": edited}}
    other = spied(with_engine(opened, component, **changes[what]), primed)
    conditioned(other, request())
    assert runs(other)[1] == (["vision", "language"] if component == "vision" else ["language"])


MACHINE: dict[str, Callable[[], Any]] = {
    "package_versions": lambda: (("onnxruntime", "0.1"),),
    "cpu_name": lambda: "another CPU",
    "cores": lambda: 77,
}


@pytest.mark.parametrize("what", [*MACHINE, "threads"])
def test_another_machine_or_number_of_threads_misses(
    opened: Bundle, primed: EncoderCache, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what in MACHINE:
        monkeypatch.setattr(identity_module, what, MACHINE[what])
    other = spied(opened, primed, threads=1 if what == "threads" else 0)
    conditioned(other, request())
    assert runs(other)[1] == ["vision", "language"]


# The same bytes


@pytest.mark.parametrize("residency", ["resident", "sequential"])
def test_bytes_are_those_without_a_cache(opened: Bundle, tmp_path: Path, residency: Residency) -> None:
    """On the disk as well; what is there does not depend on which engines stay loaded."""
    requests = [
        request("make it red", guidance=3.0),
        request(instructions=["make it blue", "make it red"], guidance=3.0, negative="make it blue"),
        request("make it red", images=[smooth_image(60, 80, 1), IMAGE]),
        request("make it red", guidance=3.0),
    ]
    disk = Cache(tmp_path, bytes_max=1 << 24)
    with uncached_editor(opened, residency=residency) as uncached:
        wanted = [contents(conditioned(uncached, asked)) for asked in requests]
    on_disk = (EncoderCache(disk=disk), EncoderCache(bytes_max=0, disk=disk))
    for cache in (EncoderCache(),) if residency == "sequential" else (EncoderCache(), *on_disk):
        with Editor(opened, residency=residency, encoder_cache=cache) as editor:
            assert [contents(conditioned(editor, asked)) for asked in requests] == wanted
        assert cache.hits > 0
    assert residency == "sequential" or on_disk[-1].misses == 0, (
        "the last editor finds on the disk what the one before it left"
    )


def test_images_are_those_without_a_cache(opened: Bundle) -> None:
    asked = request(guidance=2.0)
    with Editor(opened) as editor, uncached_editor(opened) as uncached:
        edits = [editor.edit(asked), editor.edit(asked), uncached.edit(asked)]
        assert editor.encoder_cache.hits == 2
    assert len({edit.images[0].tobytes() for edit in edits}) == 1


def test_images_of_a_gpu_are_those_without_a_cache(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where engines are unloaded after their stage, and one is never loaded in an edit."""
    gpu = Gpu()
    gpu.install(monkeypatch, "tensorrt-rtx")
    on_gpu = open_bundle(gpu.retarget(bundle, tmp_path / "gpu", "tensorrt-rtx"))
    asked = [request("make it red"), request("make it blue")]
    with uncached_editor(on_gpu, residency="sequential") as uncached:
        wanted = [uncached.edit(each).images[0].tobytes() for each in asked]
    with Editor(on_gpu, residency="sequential") as editor:
        gpu.log.clear()
        assert [editor.edit(each).images[0].tobytes() for each in (*asked, asked[0])] == [*wanted, wanted[0]]
    ran = [detail for name, detail in gpu.log if name == "queue"]
    assert (ran.count("run vision"), ran.count("run language")) == (1, 2)
    assert gpu.in_use == 0


def test_embeddings_cannot_be_written_to(editor: Editor) -> None:
    for _ in range(2):
        conditioning = conditioned(editor, request(guidance=2.0))
        assert conditioning.negative is not None
        for array in (*conditioning.prompts, conditioning.negative):
            assert array.dtype == np.float32
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_without_a_cache_everything_runs(opened: Bundle) -> None:
    """What measures and what proves relies on it: also equal prompts run."""
    editor = spied(opened, EncoderCache(bytes_max=0))
    for _ in range(2):
        conditioned(editor, request(guidance=2.0, negative="make it red"))
        assert runs(editor)[1] == ["vision", "language", "language"]
    condition(editor.stages, editor.tokenizer, request(), resolve(request(), opened.manifest))
    assert runs(editor)[1] == ["vision", "language"]
    assert (editor.encoder_cache.hits, editor.encoder_cache.misses) == (0, 0)


# Failures and threads


@pytest.mark.parametrize("problem", [KeyboardInterrupt, EngineError])
@pytest.mark.parametrize(("stops_at", "remaining"), [(1, ["vision", "language", "language"]), (3, ["language"] * 2)])
def test_a_failure_half_way_leaves_whole_entries(
    opened: Bundle, tmp_path: Path, problem: type[BaseException], stops_at: int, remaining: list[str]
) -> None:
    editor = spied(opened, EncoderCache(disk=Cache(tmp_path, bytes_max=1 << 24)))
    assert isinstance(editor.stages, Spied)

    def fail(seen: list[str]) -> None:
        if len(seen) == stops_at:
            raise problem("half-way; try again")

    wanted = request(instructions=["make it red", "make it blue"])
    editor.stages.fails = fail
    with pytest.raises(problem):
        conditioned(editor, wanted)
    runs(editor)
    editor.stages.fails = lambda runs: None
    again = conditioned(editor, wanted)
    assert runs(editor)[1] == remaining
    with uncached_editor(opened) as uncached:
        assert contents(again) == contents(conditioned(uncached, wanted))


def test_editors_and_threads_share_a_cache(opened: Bundle) -> None:
    requests = [request(text, images=[image]) for image in (IMAGE, smooth_image(90, 90, 2)) for text in ("red", "blue")]
    with uncached_editor(opened) as uncached:
        wanted = [uncached.edit(asked).images[0].tobytes() for asked in requests]
    cache = EncoderCache()
    editors = [Editor(opened, residency="resident", encoder_cache=cache) for _ in range(2)]

    def edit(number: int) -> bool:
        edited = editors[number % 2].edit(requests[number // 2 % 4])
        return edited.images[0].tobytes() == wanted[number // 2 % 4]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(edit, range(16)))
    assert cache.hits > 0
    last = spied(opened, cache)
    conditioned(last, requests[-1])
    assert runs(last) == ([], [])


def test_an_editor_has_a_cache_of_its_own(opened: Bundle) -> None:
    one, other = Editor(opened), Editor(opened)
    conditioned(one, request())
    assert one.encoder_cache.bytes > 0
    assert other.encoder_cache.bytes == 0
