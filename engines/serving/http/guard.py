"""Who may ask: not a page of another site in somebody's browser, and nobody by a name that is not this server's.

A page anywhere can let the browser of its reader post a form to this machine. Such a request names the page's site in
``Origin``. Where the site's own name leads to this machine (DNS rebinding), it is in ``Host``.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from qie.engines.serving.http.problems import HttpError, answered

__all__ = ["LOOPBACK", "Guard"]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine to itself."""

_HARMLESS = {"GET", "HEAD", "OPTIONS"}
"""Methods that change nothing, whose answer a page of another site cannot read."""


class Guard:
    """ASGI middleware that answers 403 to requests from pages of other sites, and to other names."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        """
        Args:
            app: what is guarded.
            hosts: names of this server without ports; none for whatever name a client uses.
        """
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            problem = self._problem(scope["method"], Headers(scope=scope))
            if problem is not None:
                return await answered(problem, Connection="close")(scope, receive, send)
        return await self._app(scope, receive, send)

    def _problem(self, method: str, headers: Headers) -> HttpError | None:
        address = headers.get("host", "").lower()
        name = address[: address.find("]") + 1] if address.startswith("[") else address.partition(":")[0]
        if self._hosts and name not in self._hosts:
            return HttpError(
                403, f"this server does not answer as {name[:60]!r}; ask it as {' or '.join(sorted(self._hosts))}"
            )
        origin = headers.get("origin")
        if origin is not None and method not in _HARMLESS and origin.lower().partition("://")[2] != address:
            return HttpError(
                403,
                f"this server takes no requests from pages of {origin[:60]!r}; use its own page, or ask it from a "
                f"program",
            )
        return None
