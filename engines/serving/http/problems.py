"""How errors are answered: OpenAI's JSON for each, whatever it comes from, and never a traceback."""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qie.engines.errors import BusyError, CancelledError, QieError

__all__ = [
    "PROBLEMS",
    "HttpError",
    "Problem",
    "answered",
    "error",
    "framework_problem",
    "logged_status",
    "unexpected_problem",
]

_GONE = 499
"""Status in the log of a request whose client went away (nginx)."""

_TYPES = {429: "rate_limit_error"}
"""Status -> type of the error, where the hundreds do not decide on it."""

_CODES = {
    401: "invalid_api_key",
    403: "forbidden",
    404: "model_not_found",
    413: "request_too_large",
    429: "rate_limit_exceeded",
}


class HttpError(Exception):
    """A request that is refused for what it is over HTTP, before it is one for an edit.

    Attributes:
        http_status: of the answer.
        option: the field that caused it; None where there is none.
    """

    def __init__(self, http_status: int, message: str, *, option: str | None = None) -> None:
        """
        Args:
            http_status: an attribute.
            message: for a person to read: what was found, a semicolon, and the fix.
            option: an attribute.
        """
        super().__init__(message)
        self.http_status, self.option = http_status, option


Problem = QieError | HttpError

PROBLEMS = (QieError, HttpError)
"""What ``except`` takes."""


def answered(problem: Problem, **headers: str) -> JSONResponse:
    """The answer to a request that ended with ``problem``."""
    if isinstance(problem, BusyError):
        headers["Retry-After"] = str(max(1, round(problem.retry_seconds)))
    return JSONResponse({"error": error(problem)}, status_code=problem.http_status, headers=headers)


def error(problem: Problem) -> dict[str, Any]:
    """An error in the form of OpenAI's API."""
    return _error(problem.http_status, str(problem), problem.option, _CODES.get(problem.http_status))


def logged_status(problem: Problem) -> int:
    """The status in the log."""
    return _GONE if isinstance(problem, CancelledError) else problem.http_status


async def framework_problem(request: Request, problem: Exception) -> JSONResponse:
    """Errors of the framework, such as an unknown path, in the same form."""
    assert isinstance(problem, HTTPException)
    body = _error(problem.status_code, str(problem.detail), None, None)
    return JSONResponse({"error": body}, status_code=problem.status_code, headers=problem.headers)


async def unexpected_problem(request: Request, problem: Exception) -> JSONResponse:
    """A fault of this server: the log has the traceback, the client a sentence."""
    return JSONResponse({"error": _error(500, "the server failed; its log says why", None, None)}, status_code=500)


def _error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    # what a client sent may be no valid UTF-8, and the answer must be
    text = message.encode("utf-8", "backslashreplace").decode()
    return {"message": text, "type": kind, "param": param, "code": code}
