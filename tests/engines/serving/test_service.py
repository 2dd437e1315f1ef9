"""The service: the bytes of single edits, whatever is edited beside them, and an answer to every caller."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Edit, Request
from qie.engines.errors import BusyError, CancelledError, EngineError, LateError, RequestError
from qie.engines.serving.service import Service
from qie.engines.serving.submission import Ended, Event, ImageDone, StepDone
from tests.support.images import smooth_image

IMAGES = [smooth_image(150, 90, seed=seed) for seed in range(3)]


def request(
    seed: int = 1, *, text: str = "make it red", image: int = 0, steps: int = 3, guidance: float = 1.0, seeds: int = 1
) -> Request:
    return Request(
        images=[IMAGES[image]],
        instructions=[text],
        seeds=[seed + n for n in range(seeds)],
        steps=steps,
        guidance=guidance,
    )


REQUESTS = [
    request(1),
    request(2, image=1),
    request(3, text="make it blue"),
    request(4, text="turn all of it into something green", steps=2),
    request(5, guidance=4.0),
    request(6, guidance=2.0, image=2),
    request(7, seeds=3),
    Request(images=IMAGES, instructions=["mix them", "mix these"], seeds=[8], steps=2, match_input=True),
]


@pytest.fixture
def editor(bundle: Path) -> Iterator[Editor]:
    with Editor(bundle, residency="resident") as editor:
        yield editor


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[Edit]:
    """Every request by itself."""
    with Editor(bundle) as editor:
        return [editor.edit(each) for each in REQUESTS]


def same(one: Edit, other: Edit) -> bool:
    pixels = [(np.asarray(a), np.asarray(b)) for a, b in zip(one.images, other.images, strict=True)]
    return all(np.array_equal(a, b) for a, b in pixels) and one.samples == other.samples and one.notes == other.notes


class Events:
    """A listener that remembers, and calls ``then`` with every event."""

    def __init__(self, then: Callable[[Event], None] = lambda event: None) -> None:
        self.seen: list[Event] = []
        self._then = then

    def __call__(self, event: Event) -> None:
        self.seen.append(event)
        self._then(event)


@pytest.mark.parametrize("batch_max", [1, 4])
def test_edits_beside_each_other_have_the_bytes_of_edits_alone(
    editor: Editor, alone: list[Edit], batch_max: int
) -> None:
    with Service(editor, batch_max=batch_max) as service, ThreadPoolExecutor(len(REQUESTS)) as pool:
        submissions = list(pool.map(service.submit, REQUESTS))
        edits = [submission.result(60) for submission in submissions]
    assert all(same(one, other) for one, other in zip(edits, alone, strict=True))


def test_an_edit_that_joins_a_batch_in_the_middle_has_its_own_bytes(editor: Editor, alone: list[Edit]) -> None:
    with Service(editor, batch_max=4) as service:
        joined = []

        def join(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 1:
                joined.append(service.submit(REQUESTS[1]))

        first = service.submit(REQUESTS[0], listener=Events(join))
        assert same(first.result(60), alone[0])
        assert same(joined[0].result(60), alone[1])


def test_a_caller_sees_every_step_and_every_image_and_one_end(editor: Editor) -> None:
    events = Events()
    with Service(editor) as service:
        edit = service.submit(REQUESTS[6], listener=events).result(60)
    for sample in range(3):
        steps = [(e.step, e.steps) for e in events.seen if isinstance(e, StepDone) and e.sample == sample]
        assert steps == [(1, 3), (2, 3), (3, 3)]
    images = {e.sample: e.image for e in events.seen if isinstance(e, ImageDone)}
    assert [images[n] for n in range(3)] == list(edit.images)
    assert [type(e) for e in events.seen].count(Ended) == 1
    assert isinstance(events.seen[-1], Ended)


def test_a_cancelled_edit_ends_at_once_and_changes_no_other(editor: Editor, alone: list[Edit]) -> None:
    with Service(editor, batch_max=4) as service:
        gone = threading.Event()

        def leave(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 1 and not gone.is_set():
                gone.set()
                leaves.cancel()

        hold = threading.Event()
        blocked = service.submit(request(50, text="hold"), listener=lambda event: void(hold.wait(30)))
        leaves = service.submit(request(9, steps=9), listener=leave)
        stays = service.submit(REQUESTS[0])
        hold.set()
        with pytest.raises(CancelledError):
            leaves.result(60)
        assert same(stays.result(60), alone[0])
        blocked.result(60)
        leaves.cancel()  # again: nothing


def void(value: object) -> None:
    """Drop a result."""


def test_what_cannot_be_edited_is_refused_at_once(editor: Editor) -> None:
    with Service(editor) as service:
        with pytest.raises(RequestError):
            service.submit(request(text="  "))
        with pytest.raises(RequestError):
            service.submit(request(steps=0))


def test_more_images_than_may_ever_wait_are_refused(editor: Editor) -> None:
    with Service(editor, waiting_max=2) as service:
        with pytest.raises(RequestError, match="3 images are asked for, and 2 may wait"):
            service.submit(request(seeds=3))
        assert len(service.submit(request(seeds=2)).result(60).images) == 2


def test_a_full_queue_refuses_and_says_when_to_come_back(editor: Editor) -> None:
    hold = threading.Event()
    with Service(editor, batch_max=1, running_max=1, waiting_max=2) as service:
        started = threading.Event()

        def wait(event: Event) -> None:
            started.set()
            hold.wait(30)

        accepted = [service.submit(request(1), listener=wait)]
        assert started.wait(30)
        accepted += [service.submit(request(n)) for n in (2, 3)]
        with pytest.raises(BusyError, match="2 edits wait, of 2 that may") as refused:
            service.submit(request(4))
        assert refused.value.retry_seconds >= 0
        with pytest.raises(BusyError):
            service.submit(request(5, seeds=2))
        hold.set()
        assert all(submission.result(60) for submission in accepted)


def test_an_edit_that_is_late_gets_an_error_and_frees_its_place(editor: Editor, alone: list[Edit]) -> None:
    hold = threading.Event()
    with Service(editor, batch_max=1, running_max=1) as service:
        first = service.submit(request(1), listener=lambda event: void(hold.wait(30)))
        late = service.submit(request(2), timeout=0.0)
        last = service.submit(REQUESTS[0])
        hold.set()
        with pytest.raises(LateError):
            late.result(60)
        first.result(60)
        assert same(last.result(60), alone[0])


def test_an_engine_that_fails_fails_the_edits_of_that_batch_alone(
    editor: Editor, alone: list[Edit], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qie.engines.editing.denoise import Denoiser

    step = Denoiser.step

    def fail_with_guidance(self: Denoiser) -> None:
        if self.negative_velocity_is_computed:
            raise EngineError("the GPU is out of memory; use smaller images")
        step(self)

    monkeypatch.setattr(
        Denoiser, "negative_velocity_is_computed", property(lambda d: vars(d)["_negative_inputs"]), raising=False
    )
    monkeypatch.setattr(Denoiser, "step", fail_with_guidance)
    with Service(editor, batch_max=4) as service:
        fails, works = service.submit(REQUESTS[4]), service.submit(REQUESTS[0])
        with pytest.raises(EngineError, match="out of memory"):
            fails.result(60)
        assert same(works.result(60), alone[0])
        assert same(service.submit(REQUESTS[1]).result(60), alone[1])
    assert "out of memory" in caplog.text


def test_closing_completes_what_was_accepted(editor: Editor, alone: list[Edit]) -> None:
    service = Service(editor, batch_max=2)
    submissions = [service.submit(each) for each in REQUESTS[:3]]
    service.close()
    assert all(same(s.result(0), expected) for s, expected in zip(submissions, alone, strict=False))
    with pytest.raises(BusyError, match="ends"):
        service.submit(REQUESTS[0])
    service.close()


def test_closing_without_draining_cancels(editor: Editor) -> None:
    service = Service(editor, batch_max=1, running_max=1)
    submissions = [service.submit(request(n, steps=20)) for n in range(3)]
    service.close(drain=False)
    for submission in submissions:
        with pytest.raises(CancelledError):
            submission.result(0)


def test_engines_that_do_not_fit_together_give_the_same_bytes(
    bundle: Path, alone: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qie.engines.editing.stages import Stages

    monkeypatch.setattr(Stages, "loads_cheaply", property(lambda self: False))
    with Editor(bundle, residency="sequential") as editor, Service(editor, batch_max=4) as service:
        submissions = [service.submit(each) for each in REQUESTS]
        assert all(same(s.result(60), expected) for s, expected in zip(submissions, alone, strict=True))


def test_nothing_is_kept_of_edits_that_ended(editor: Editor) -> None:
    with Service(editor, batch_max=4) as service:
        for number in range(4):
            service.submit(request(number)).result(60)
        service.submit(request(5, steps=9)).cancel()
        service.submit(request(6)).result(60)
        state = vars(service)
        assert not state["_samples"]
        assert len(state["_schedules"]) <= 1
