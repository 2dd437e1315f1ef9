"""A connection to a running server of vLLM: requests and answers over HTTP, and what each failure means."""

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qie.engines.errors import EngineError, RequestError, first_line
from qie.engines.records import brief

__all__ = ["OPTION", "Answer", "Connection", "parse_url"]

OPTION = "vllm_url"
"""The argument that the errors are about."""

KEY = "VLLM_API_KEY"
"""Environment variable with the key of a server that wants one, as vLLM itself names it."""

CONNECT_SECONDS = 10.0
"""For the first question to a server, which it answers at once."""

RUN_SECONDS = 300.0
"""For a prompt: the server may have those of others before it."""

MOST_BYTES = 1 << 30
"""Largest answer that is read: the hidden states of 70,000 tokens of width 3584."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a server answered with status 200.

    Attributes:
        body: bytes.
        metadata: JSON of the header of that name, where the body is an array; None elsewhere.
    """

    body: bytes
    metadata: Any = None

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is something else.
        """
        return json.loads(self.body)


def parse_url(url: str) -> str:
    """``url`` without what follows the host, a final slash or ``/v1``.

    Raises:
        RequestError: it is no URL of HTTP.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
        good = good and parts.port != 0 and url.isascii() and not any(c.isspace() for c in url)
    except ValueError:
        good = False
    if not good:
        raise RequestError(
            f"the URL of the vLLM server is {brief(url)}; give one such as http://127.0.0.1:8000", option=OPTION
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class Connection:
    """A server by its URL."""

    def __init__(self, url: str) -> None:
        """Nothing is sent.

        Raises:
            RequestError: see ``parse_url``.
        """
        self.url = parse_url(url)

    def get(self, path: str) -> Answer:
        """What the server has at ``path``.

        Raises:
            EngineError: see ``post``.
        """
        return self._send(urllib.request.Request(f"{self.url}{path}"), CONNECT_SECONDS, _refused)

    def post(
        self, path: str, content: Any, *, refused: "Callable[[Connection, int, str], EngineError] | None" = None
    ) -> Answer:
        """What the server answers to JSON.

        Args:
            path: on the server.
            content: plain data.
            refused: makes the error of an answer with another status than 200, from that and the server's message.

        Raises:
            EngineError: there is no server, it took too long, broke off, or answered with another status.
        """
        request = urllib.request.Request(
            f"{self.url}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        return self._send(request, RUN_SECONDS, refused or _refused)

    def _send(
        self,
        request: urllib.request.Request,
        seconds: float,
        refused: "Callable[[Connection, int, str], EngineError]",
    ) -> Answer:
        if key := os.environ.get(KEY):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                body = response.read(MOST_BYTES + 1)
                metadata = response.headers.get("metadata")
            if len(body) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes")
            return Answer(body=body, metadata=None if metadata is None else json.loads(metadata))
        except urllib.error.HTTPError as problem:
            raise refused(self, problem.code, _message(problem)) from problem
        except TimeoutError as problem:
            raise self._slow(seconds) from problem
        except urllib.error.URLError as problem:
            if isinstance(problem.reason, TimeoutError):
                raise self._slow(seconds) from problem
            reason = getattr(problem.reason, "strerror", None) or problem.reason
            raise EngineError(
                f"there is no vLLM server at {self.url} ({reason}); start it as docs/language.md says, or correct the "
                "URL",
                option=OPTION,
            ) from problem
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise EngineError(
                f"the server at {self.url} broke off or answered with no HTTP ({first_line(problem)}); see its log",
                option=OPTION,
            ) from problem

    def _slow(self, seconds: float) -> EngineError:
        return EngineError(
            f"the vLLM server at {self.url} gave no answer within {seconds:g} s; see its log and its load",
            option=OPTION,
        )


def _refused(connection: Connection, status: int, message: str) -> EngineError:
    if status in (401, 403):
        fix = f"set {KEY} to its key"
    elif status >= 500:
        fix = "see its log"
    else:
        fix = "start vLLM's server for the language model, as docs/language.md says"
    return EngineError(f"the server at {connection.url} answered with {status} ({message}); {fix}", option=OPTION)


def _message(problem: urllib.error.HTTPError) -> str:
    """What the server says of an error: a line."""
    try:
        text = problem.read(1 << 16).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return str(problem.reason)
    try:
        content = json.loads(text)
        said = content.get("error", content) if isinstance(content, dict) else content
        text = str(said.get("message") or said.get("detail") or said) if isinstance(said, dict) else str(said)
    except (ValueError, RecursionError):
        pass
    line = " ".join(text.split()).replace(";", ",").rstrip(".")
    return line[:300] or str(problem.reason)
