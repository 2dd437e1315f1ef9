"""The server in front of the application: a socket, and connections that are given up where they ask for nothing."""

import asyncio
import os
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from qie.engines.errors import RequestError

__all__ = ["HEAD_SECONDS", "listen", "server"]

HEAD_SECONDS = 30.0
"""How long a connection may take to send the head of a request."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is a free one.

    Raises:
        RequestError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as problem:
        reason = os.strerror(problem.errno) if problem.errno and problem.errno > 0 else str(problem)
        raise RequestError(
            f"{host} port {port} cannot be listened on ({reason}); choose another one",
            option="port",
        ) from None


def server(app: FastAPI) -> uvicorn.Server:
    """The server of ``app``, which waits at its end for the answers that are on their way."""
    config = uvicorn.Config(app, http=_Connection, ws="none", loop="asyncio", log_level="warning", access_log=False)
    return uvicorn.Server(config)


class _Connection(H11Protocol):
    """A connection that is closed where the head of a request takes too long."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # a part of a head
            self._watch()
        else:
            self._stop()

    def _watch(self) -> None:
        if self._patience is None:
            self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
