"""The application: OpenAI's ``POST /v1/images/edits`` in front of a service, with what operators ask for."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qie.engines.errors import CancelledError
from qie.engines.serving.http.body import BodyLimit
from qie.engines.serving.http.events import answer
from qie.engines.serving.http.fields import EditCall, Format, Limits, parse_call
from qie.engines.serving.http.form import read_fields
from qie.engines.serving.http.guard import Guard
from qie.engines.serving.http.metrics import Metrics
from qie.engines.serving.http.page import add_page
from qie.engines.serving.http.problems import (
    PROBLEMS,
    HttpError,
    Problem,
    answered,
    framework_problem,
    logged_status,
    unexpected_problem,
)
from qie.engines.serving.http.running import EventStream, Running
from qie.engines.serving.http.schema import answers, edits
from qie.engines.serving.http.values import shown
from qie.engines.serving.service import Service

__all__ = ["Options", "create_app"]

_log = logging.getLogger("qie.serving.http")

_DECODED_TOGETHER = 4
"""Requests whose images are decoded at once, each of which may be large."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How the application answers.

    Attributes:
        keys: one of them must come with every request for an edit or a model; none for everybody.
        hosts: names by which clients may address it, without ports; none for every name.
        limits: what a request may take.
        timeout: seconds after which a request is not edited any further.
        pause: seconds without a byte of a body after which it is not read any further.
        log_prompts: whether the log has the prompts.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    limits: Limits = field(default_factory=Limits)
    timeout: float = 600.0
    pause: float = 30.0
    log_prompts: bool = False


def create_app(start: Callable[[Metrics], Service], options: Options) -> FastAPI:
    """The application.

    Args:
        start: opens the service, which is closed with the application; what runs then is completed.
        options: how it answers.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = await run_in_threadpool(start, metrics)
        metrics.watch(service)
        app.state.service = service
        try:
            yield
        finally:
            await run_in_threadpool(service.close)

    app = FastAPI(title="qie", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(BodyLimit, most=options.limits.body_bytes, pause=options.pause, seconds=options.timeout)
    app.add_middleware(Guard, hosts=options.hosts)
    app.add_exception_handler(HTTPException, framework_problem)
    app.add_exception_handler(Exception, unexpected_problem)
    api = _Api(options, metrics)
    problems = answers(400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
    app.add_api_route("/v1/images/edits", api.edits, methods=["POST"], responses=problems, openapi_extra=edits())
    reading = partial(app.add_api_route, methods=["GET", "HEAD"])
    reading("/v1/models", api.models, responses=answers(401, 403))
    reading("/v1/models/{name:path}", api.model, responses=answers(401, 403, 404))
    reading("/healthz", _healthy, response_class=PlainTextResponse)
    reading("/readyz", _ready, response_class=PlainTextResponse, responses={503: {"description": "not ready"}})
    reading("/metrics", api.metrics, response_class=PlainTextResponse)
    add_page(app)
    return app


class _Api:
    """The routes that need the options or the metrics."""

    def __init__(self, options: Options, metrics: Metrics) -> None:
        self._options, self._metrics = options, metrics
        self._decoding = asyncio.Semaphore(_DECODED_TOGETHER)

    async def edits(self, request: Request) -> Response:
        """Edit one to three images with a prompt."""
        line = _Line(self._options)
        try:
            self._authorize(request)
            running, form, stream = await self._submitted(request, line)
            if stream:
                return EventStream(running, form, ended=partial(self._ended, line))
            images = await running.images(request, form)
        except PROBLEMS as problem:
            self._ended(line, problem, 0)
            return answered(problem)
        except ClientDisconnect:
            gone = CancelledError("the client went away")
            self._ended(line, gone, 0)
            return answered(gone)
        self._ended(line, None, len(images))
        return JSONResponse(answer(form, running.submission, images))

    async def _submitted(self, request: Request, line: "_Line") -> tuple[Running, Format, bool]:
        """The edit that ``request`` asks for, the form of its answer, and whether that is a stream.

        Raises:
            RequestError: the request cannot be used.
            BusyError: too many edits wait.
        """
        service: Service = request.app.state.service
        tokenizer, limits = service.editor.tokenizer, self._options.limits
        fields = await read_fields(request)
        async with self._decoding:
            call = await run_in_threadpool(parse_call, fields, tokenizer=tokenizer, limits=limits)
            fields.clear()
            line.tell(call)
            _check_model(call.model, service)
            client = call.form.safety_identifier or _host(request)
            running = await Running.submit(service, call, client=client, timeout=self._options.timeout)
        return running, call.form, call.stream

    async def models(self, request: Request) -> Response:
        """The model that is served."""
        try:
            self._authorize(request)
        except PROBLEMS as problem:
            return answered(problem)
        models = [_model(name) for name in _names(request.app.state.service)[:1]]
        return JSONResponse({"object": "list", "data": models})

    async def model(self, name: str, request: Request) -> Response:
        """One model."""
        try:
            self._authorize(request)
            _check_model(name, request.app.state.service)
        except PROBLEMS as problem:
            return answered(problem)
        return JSONResponse(_model(name))

    async def metrics(self) -> Response:
        """Metrics in the text format of Prometheus."""
        return PlainTextResponse(self._metrics.text(), media_type="text/plain; version=0.0.4")

    def _authorize(self, request: Request) -> None:
        """Check the API key.

        Raises:
            HttpError: it is missing or wrong.
        """
        keys = self._options.keys
        if not keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        sent = given.strip().encode("latin-1")  # as which Starlette decodes the bytes of headers
        matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise HttpError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")

    def _ended(self, line: "_Line", problem: Problem | None, images: int) -> None:
        """Count and log a request that ended with ``problem``, or with ``images``."""
        if problem is None:
            self._metrics.done(images, line.seconds)
            line.write("done", 200)
        else:
            outcome = self._metrics.ended(problem)
            line.write(outcome, logged_status(problem), error=str(problem) if outcome == "failed" else None)


class _Line:
    """The line of a request in the log: JSON, without the prompt and the images unless that was asked for."""

    def __init__(self, options: Options) -> None:
        self._log_prompts = options.log_prompts
        self._begun = time.perf_counter()
        self._facts: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._begun

    def tell(self, call: EditCall) -> None:
        """Keep what the log says of ``call``."""
        request = call.request
        self._facts = {"images": len(request.images), "results": len(request.seeds or (0,)), "stream": call.stream}
        if self._log_prompts:
            self._facts["prompt"] = request.instructions[0]

    def write(self, outcome: str, status: int, error: str | None = None) -> None:
        """Log how the request ended."""
        line = {"outcome": outcome, "status": status, "seconds": round(self.seconds, 3), **self._facts}
        _log.info(json.dumps(line if error is None else {**line, "error": error}))


def _host(request: Request) -> str:
    return request.client.host if request.client else ""


def _names(service: Service) -> list[str]:
    """The names of what is served: of the bundle and of the model."""
    return list(dict.fromkeys([service.editor.bundle.name, service.editor.model.name]))


def _check_model(name: str | None, service: Service) -> None:
    """Check that a model is served.

    Raises:
        HttpError: it is not.
    """
    names = _names(service)
    if name is not None and name not in names:
        raise HttpError(404, f"there is no model {shown(name)}; this server has {' or '.join(names)}", option="model")


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "qie"}


async def _healthy(request: Request) -> Response:
    """Whether the server lives."""
    return PlainTextResponse("ok\n")


async def _ready(request: Request) -> Response:
    """Whether the server takes requests."""
    service: Service | None = getattr(request.app.state, "service", None)
    if service is not None and service.accepts:
        return PlainTextResponse("ready\n")
    return PlainTextResponse("not ready\n", status_code=503)
