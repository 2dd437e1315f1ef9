"""The page at ``/``: three static files that come with qie, and nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

from qie.engines.serving import http

__all__ = ["add_page"]

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page and its files to ``app``."""
    for name, kind in _TYPES.items():
        path = "/" if name == "index.html" else f"/static/{name}"
        app.add_api_route(path, _file(name, kind), methods=["GET", "HEAD"], include_in_schema=False)


def _file(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = resources.files(http).joinpath("static", name).read_bytes()

    async def file() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return file
