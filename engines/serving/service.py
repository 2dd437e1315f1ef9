"""One bundle for many callers: requests wait, are batched, and run step by step in a thread of their own.

The thread does the pieces of work that ``qie.engines.serving.scheduler`` chooses, with the stages of an edit. A request
with several instructions or seeds is as many samples, whose images are encoded once. Every image has the bytes that it
has where it is edited alone.
"""

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from qie.engines.editing.denoise import Denoiser, Row, UploadedSchedule, upload_schedule
from qie.engines.editing.edit import check_finite, decode, row_of, table_dtype
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import BusyError, LateError, RequestError
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.serving.scheduler import Complete, Prepare, Scheduler, Step, Work
from qie.engines.serving.submission import Bucket, Listener, Submission, ignore
from qie.engines.sessions.session import Session

__all__ = ["WAITING_MAX", "Service", "StepListener"]

WAITING_MAX = 64
"""Samples that may wait, by default."""

StepListener = Callable[[int, float], None]

Array = NDArray[np.float32]

_log = logging.getLogger("qie.serving")


@dataclass(kw_only=True, slots=True, eq=False)
class _Sample:
    """A sample that waits or runs.

    Attributes:
        submission: its request.
        index: its number in the request.
        row: before its next step, or before the first step of the batch that it is in; None before it is prepared.
    """

    submission: Submission
    index: int
    row: Row | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Batch:
    """Samples that take their steps together, by their number in the scheduler."""

    numbers: tuple[int, ...]
    denoiser: Denoiser


class Service:
    """Runs the requests of many threads with the engines of one editor; ``with Service(...) as service`` closes it.

    Attributes:
        editor: the editor, which nobody else may use meanwhile.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        batch_max: int | None = None,
        running_max: int | None = None,
        waiting_max: int = WAITING_MAX,
        on_step: StepListener = lambda samples, seconds: None,
    ) -> None:
        """Start the thread; engines are loaded with the first request.

        Args:
            editor: whose engines run.
            batch_max: samples that take a step together; None for as many as the engines take.
            running_max: samples whose tensors are in memory; None for two batches.
            waiting_max: samples that may wait.
            on_step: called with the samples and the seconds of every step.
        """
        largest = editor.bundle.manifest.limits.batch_max
        batch = largest if batch_max is None else min(batch_max, largest)
        self.editor = editor
        self._scheduler = Scheduler(
            batch_max=batch,
            running_max=2 * batch if running_max is None else running_max,
            waiting_max=waiting_max,
            swaps=not editor.stages.loads_cheaply,
        )
        self._changed = threading.Condition()  # guards the scheduler and the samples
        self._samples: dict[int, _Sample] = {}
        self._next_number, self._ends = 0, False
        self._batches: dict[Hashable, _Batch] = {}  # of the thread alone, as all below
        self._schedules: dict[bytes, UploadedSchedule] = {}
        self._engines = ExitStack()
        self._transformer: Session | None = None
        self._step_seconds = 0.0
        self._on_step = on_step
        self._thread = threading.Thread(target=self._run, name="edits", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return self._scheduler.waiting

    @property
    def running(self) -> int:
        """Samples that are prepared, or being prepared, and not completed."""
        return self._scheduler.running

    @property
    def accepts(self) -> bool:
        """Whether it takes requests: it was not closed, and its thread lives."""
        return not self._ends and self._thread.is_alive()

    def submit(
        self,
        request: Request,
        *,
        client: Hashable = None,
        timeout: float | None = None,
        previews: int = 0,
        listener: Listener = ignore,
    ) -> Submission:
        """Let a request wait; its images are scaled and its prompts cut into tokens in the caller's thread.

        Args:
            request: what to edit and how.
            client: who asks, for an order that is fair between clients.
            timeout: seconds after which nobody waits for the result; None for no such time.
            previews: of each sample, at even distances; none where engines do not fit into the GPU together.
            listener: called with every event, in the thread of the service.

        Raises:
            RequestError: the request cannot be edited, or has more samples than may wait.
            BusyError: too many samples wait, or the service ends.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.editor.stages.loads_cheaply:
            previews = 0
        submission = Submission(request, self.editor, previews=previews, listener=listener, cancel=self._drop)
        samples = len(submission.settings.samples)
        with self._changed:
            self._check_room(samples)
            for index in range(samples):
                number = self._next_number
                self._next_number += 1
                self._scheduler.add(
                    number,
                    bucket=submission.bucket(index),
                    steps=submission.settings.steps,
                    client=client,
                    deadline=deadline,
                )
                self._samples[number] = _Sample(submission=submission, index=index)
                submission.numbers.append(number)
            self._changed.notify()
        return submission

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, end the thread and close the editor. Closing twice is allowed.

        Args:
            drain: complete what waits and runs; otherwise it is cancelled.
        """
        with self._changed:
            self._ends = True
            left = [] if drain else [sample.submission for sample in self._samples.values()]
            self._changed.notify()
        for submission in left:
            submission.cancel()
        self._thread.join()
        self.editor.close()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=kind is None)

    def _check_room(self, samples: int) -> None:
        """Check that so many samples may wait.

        Raises:
            RequestError: they may never.
            BusyError: they may not now.
        """
        if self._ends:
            raise BusyError("the service ends; ask another one", retry_seconds=1)
        scheduler = self._scheduler
        if samples > scheduler.waiting_max:
            raise RequestError(
                f"{samples} images are asked for, and {scheduler.waiting_max} may wait; ask for fewer at once"
            )
        if scheduler.waiting + samples > scheduler.waiting_max:
            seconds = scheduler.steps_left * self._step_seconds / scheduler.batch_max
            raise BusyError(
                f"{scheduler.waiting} edits wait, of {scheduler.waiting_max} that may; ask again in about "
                f"{max(1, round(seconds))} s",
                retry_seconds=seconds,
            )

    def _drop(self, submission: Submission) -> None:
        """Forget the samples of a request that has ended."""
        with self._changed:
            for number in submission.numbers:
                self._scheduler.cancel(number)
                self._samples.pop(number, None)

    def _run(self) -> None:
        """Do one piece of work after the other until the service ends and nothing is left."""
        kind: type[Work] | None = None
        while (work := self._next()) is not None:
            if type(work) is not kind:
                self._release()
                kind = type(work)
            self._do(work)
            with self._changed:
                self._scheduler.done(work)
                gone = [
                    bucket for bucket, batch in self._batches.items() if self._samples.keys().isdisjoint(batch.numbers)
                ]
            for bucket in gone:
                del self._batches[bucket]
        self._batches.clear()
        self._schedules.clear()
        self._release()

    def _release(self) -> None:
        """Give back what the kind of work before held."""
        self._engines.close()
        self._transformer = None

    def _next(self) -> Work | None:
        """Wait for a piece of work; None where the service ends."""
        with self._changed:
            while True:
                self._expire()
                work = self._scheduler.next()
                if work is not None or self._ends:
                    return work
                self._changed.wait()

    def _expire(self) -> None:
        for number in self._scheduler.expire(time.monotonic()):
            if number in self._samples:  # of one request all samples expire
                submission = self._samples[number].submission
                submission.fail(LateError("the edit was not done within its time; ask again when fewer edits wait"))
                self._drop(submission)

    def _do(self, work: Work) -> None:
        """Do ``work`` for those of its samples that are not cancelled; what fails is told to their requests."""
        numbers = work.edits if isinstance(work, Step) else (work.edit,)
        with self._changed:
            samples = {number: self._samples[number] for number in numbers if number in self._samples}
        if not samples:
            return
        try:
            match work:
                case Prepare(edit=number):
                    self._prepare(samples[number])
                case Step(bucket=Bucket() as bucket):
                    self._step(bucket, samples)
                case Complete(edit=number):
                    self._complete(number, samples[number])
        except Exception as problem:  # whatever it is, other requests go on
            _log.exception("an edit failed")
            if isinstance(work, Step):
                self._batches.pop(work.bucket, None)
            for submission in {id(sample.submission): sample.submission for sample in samples.values()}.values():
                submission.fail(problem)
                self._drop(submission)

    def _prepare(self, sample: _Sample) -> None:
        submission = sample.submission
        sample.row = row_of(submission.conditioning(), submission.settings, submission.noise, sample.index)

    def _step(self, bucket: Bucket, samples: Mapping[int, _Sample]) -> None:
        """Take a step of every sample, in a batch that is put together anew where one has joined or left it."""
        begun = time.perf_counter()
        numbers, batch = tuple(samples), self._batches.get(bucket)
        if batch is None or batch.numbers != numbers:
            self._disband(bucket)
            if self._transformer is None:
                self._transformer = self._engines.enter_context(self.editor.stages.session("transformer"))
            batch = self._batches[bucket] = self._batch_of(bucket, samples, self._transformer)
        rows = [sample.row for sample in samples.values() if sample.row is not None]
        taken = [row.step + batch.denoiser.steps_done + 1 for row in rows]
        each = list(zip(samples.values(), taken, strict=True))
        seen = any(step in sample.submission.previews for sample, step in each)
        before = batch.denoiser.latents() if seen else None
        batch.denoiser.step()
        after = batch.denoiser.latents() if seen else None
        for place, (sample, step) in enumerate(each):
            sample.submission.step_done(sample.index, step)
            if before is not None and after is not None and step in sample.submission.previews:
                last = _last_latents(sample.submission.schedule, step, before[place], after[place])
                sample.submission.preview(sample.index, step, last)
        if batch.denoiser.steps_done == batch.denoiser.steps:
            self._disband(bucket)
        self._step_seconds = time.perf_counter() - begun
        self._on_step(len(samples), self._step_seconds)

    def _batch_of(self, bucket: Bucket, samples: Mapping[int, _Sample], session: Session) -> _Batch:
        submission = next(iter(samples.values())).submission
        if bucket.sigmas not in self._schedules:
            stages = self.editor.stages
            tables = modulation_tables(
                stages.bundle, submission.schedule, dtype=table_dtype(stages.engines["transformer"])
            )
            self._schedules = {bucket.sigmas: upload_schedule(session, submission.schedule, tables)}
        denoiser = Denoiser.start(
            session,
            [sample.row for sample in samples.values() if sample.row is not None],
            schedule=self._schedules[bucket.sigmas],
            rotary=self.editor.model.rotary,
            grids=bucket.grids,
        )
        return _Batch(numbers=tuple(samples), denoiser=denoiser)

    def _disband(self, bucket: Bucket) -> None:
        """Give the samples of a batch their latents back."""
        batch = self._batches.pop(bucket, None)
        if batch is None:
            return
        taken = batch.denoiser.steps_done
        for number, latents_NC in zip(batch.numbers, batch.denoiser.latents(), strict=True):
            sample = self._samples.get(number)
            if sample is not None and sample.row is not None:
                sample.row = replace(sample.row, latents=latents_NC, step=sample.row.step + taken)

    def _complete(self, number: int, sample: _Sample) -> None:
        submission, stages = sample.submission, self.editor.stages
        assert sample.row is not None
        check_finite(sample.row.latents, stages.bundle)
        image = decode(stages, sample.row.latents, submission.request, submission.settings)
        with self._changed:
            self._samples.pop(number, None)
        submission.image_done(sample.index, image)


def _last_latents(schedule_S: Array, step: int, before_NC: Array, after_NC: Array) -> Array:
    """The latents at sigma 0 if the velocity stayed that of step number ``step`` - 1, as float32 [N, C]."""
    sigma, following = schedule_S[step - 1], schedule_S[step]
    return after_NC - following * ((after_NC - before_NC) / (following - sigma))
