"""Limits on the body of a request, whatever it says about its own length: its bytes, its time, those of all bodies."""

import asyncio
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from qie.engines.errors import BusyError
from qie.engines.serving.http.problems import HttpError, Problem, answered

__all__ = ["BodyLimit"]

_TOGETHER = 16
"""Bodies of the largest size that are in memory at once."""

_DISCARD_SECONDS = 2.0
"""How long a body that is refused is read on: a client that still sends does not read the answer."""


class BodyLimit:
    """ASGI middleware that answers 413, 408 or 429 as soon as a body is too long, too slow, or one of too many."""

    def __init__(self, app: ASGIApp, most: int, pause: float, seconds: float) -> None:
        """
        Args:
            app: what reads the bodies.
            most: bytes of a body.
            pause: seconds without a byte.
            seconds: until a body has come.
        """
        self._app, self._most, self._pause, self._seconds = app, most, pause, seconds
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        received, complete, answering = 0, False, False
        ends = time.monotonic() + self._seconds

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), min(self._pause, ends - time.monotonic()))
            except TimeoutError:
                raise _Refused(HttpError(408, "the body does not arrive in time; send it faster")) from None
            size = len(message.get("body", b""))
            received += size
            self._held += size
            if received > self._most:
                raise _Refused(self._too_long())
            if self._held > _TOGETHER * self._most:
                raise _Refused(BusyError("too many requests arrive at once; ask again later", retry_seconds=5))
            complete = not message.get("more_body", False)
            return message

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal answering
            answering = True
            await send(message)

        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"")
        try:
            if stated.isdigit() and int(stated) > self._most:
                raise _Refused(self._too_long())
            await self._app(scope, counted, watched)
        except _Refused as refused:
            if not answering:
                if b"expect" not in headers:  # a client that waits for a 100 sends no body
                    await _discard(receive)
                await answered(refused.problem, Connection="close")(scope, receive, send)
        finally:
            self._held -= received
        return None

    def _too_long(self) -> HttpError:
        return HttpError(413, f"the request has more than {self._most >> 20} MiB; send smaller images")


async def _discard(receive: Receive) -> None:
    """Read what is left of a body, or as much of it as comes in a short time, and forget it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while (await receive()).get("more_body", False):
                pass


class _Refused(Exception):
    """The body is not read any further."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem
