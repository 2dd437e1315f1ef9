"""A submission whose events come to the event loop, and the stream of server-sent events that tells them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from qie.engines.errors import CancelledError, QieError
from qie.engines.serving.http.events import encoded, event, of_image, of_result
from qie.engines.serving.http.fields import EditCall, Format
from qie.engines.serving.http.problems import Problem, error
from qie.engines.serving.service import Service
from qie.engines.serving.submission import Ended, Event, ImageDone, Preview, StepDone, Submission

__all__ = ["EventStream", "Running"]


class Running:
    """A submission whose events come to the event loop.

    Attributes:
        submission: what runs.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.submission: Submission

    @classmethod
    async def submit(cls, service: Service, call: EditCall, *, client: str, timeout: float) -> "Running":
        """Submit ``call``.

        Raises:
            RequestError, BusyError: see ``Service.submit``.
        """
        running = cls()
        running.submission = await run_in_threadpool(
            service.submit,
            call.request,
            client=client,
            timeout=timeout,
            previews=call.partial_images,
            listener=running._listen,
        )
        return running

    def _listen(self, happened: Event) -> None:
        """Called in the thread of the service."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, happened)

    async def events(self) -> AsyncIterator[Event]:
        """Every event until the submission has ended."""
        while not isinstance(happened := await self._queue.get(), Ended):
            yield happened

    async def images(self, request: Request, form: Format) -> list[str]:
        """The encoded images; the edit is cancelled where the client goes away.

        Raises:
            QieError: see ``Submission.result``.
        """
        gone = asyncio.create_task(_disconnected(request))
        gone.add_done_callback(lambda task: None if task.cancelled() else self.submission.cancel())
        found: dict[int, str] = {}
        try:
            async for happened in self.events():
                if isinstance(happened, ImageDone):
                    found[happened.sample] = await run_in_threadpool(encoded, happened.image, form)
        finally:
            gone.cancel()
            self.submission.cancel()
        self.submission.result(0)
        return [found[sample] for sample in range(len(found))]


class EventStream(StreamingResponse):
    """The events of a running edit, which is cancelled where the client goes away."""

    def __init__(self, running: Running, form: Format, *, ended: Callable[[Problem | None, int], None]) -> None:
        """
        Args:
            running: the edit.
            form: of its images.
            ended: called once with what the edit ended with, None for its result, and with its images.
        """
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._content(), media_type="text/event-stream", headers=headers)
        self._running, self._form, self._ended = running, form, ended
        self._problem: QieError | None = CancelledError("the client went away")
        self._images = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; the client may be gone before the first one."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.submission.cancel()
            self._ended(self._problem, self._images)

    async def _content(self) -> AsyncIterator[bytes]:
        """A first byte at once, every step, every image."""
        yield b": accepted\n\n"
        submission = self._running.submission
        try:
            async for happened in self._running.events():
                yield await self._told(happened, submission)
                if self._images == len(submission.settings.samples):  # all was sent, whatever the client does now
                    self._problem = None
            submission.result(0)
        except QieError as problem:
            self._problem = problem
            yield event({"type": "error", "error": error(problem)})

    async def _told(self, happened: Event, submission: Submission) -> bytes:
        match happened:
            case StepDone():
                facts = {"sample": happened.sample, "step": happened.step, "steps": happened.steps}
                return event({"type": "image_edit.step", **facts})
            case Preview():
                content = await run_in_threadpool(encoded, happened.image, self._form)
                more = {"sample": happened.sample, "partial_image_index": happened.number}
                return event(of_image("image_edit.partial_image", self._form, happened.image, content, **more))
            case ImageDone():
                content = await run_in_threadpool(encoded, happened.image, self._form)
                self._images += 1
                return event(of_result(happened, self._form, content, submission))
        raise AssertionError(happened)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
