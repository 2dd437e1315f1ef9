"""What Prometheus reads: the queue, the batches, the time of steps and requests, and how requests ended."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qie.engines.errors import BusyError, CancelledError, LateError, RequestError
from qie.engines.serving.http.problems import HttpError
from qie.engines.serving.service import Service

__all__ = ["Metrics"]

_STEP_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_REQUEST_SECONDS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)

_OUTCOMES: tuple[tuple[type[BaseException], str], ...] = (
    (CancelledError, "cancelled"),
    (BusyError, "busy"),
    (LateError, "late"),
    (RequestError, "refused"),
    (HttpError, "refused"),
    (BaseException, "failed"),
)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("qie_requests", "Requests by how they ended.", ["outcome"], registry=self._registry)
        for outcome in ("done", *(name for _, name in _OUTCOMES)):
            self._requests.labels(outcome)
        self._images = Counter("qie_images", "Images that were made.", registry=self._registry)
        self._seconds = Histogram(
            "qie_request_seconds", "Time of requests that were done.", buckets=_REQUEST_SECONDS, registry=self._registry
        )
        self._step_seconds = Histogram(
            "qie_step_seconds", "Time of a step of a batch.", buckets=_STEP_SECONDS, registry=self._registry
        )
        self._batches = Histogram(
            "qie_batch_images",
            "Images that took a step together.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        )

    def watch(self, service: Service) -> None:
        """Read the queue of ``service`` whenever the metrics are read."""
        waiting = Gauge("qie_waiting_images", "Images that wait.", registry=self._registry)
        waiting.set_function(lambda: service.waiting)
        running = Gauge("qie_running_images", "Images that are being made.", registry=self._registry)
        running.set_function(lambda: service.running)

    def step(self, images: int, seconds: float) -> None:
        """Count a step of a batch."""
        self._batches.observe(images)
        self._step_seconds.observe(seconds)

    def done(self, images: int, seconds: float) -> None:
        """Count a request that was done."""
        self._requests.labels("done").inc()
        self._images.inc(images)
        self._seconds.observe(seconds)

    def ended(self, problem: BaseException) -> str:
        """Count a request that ended with ``problem``: its outcome."""
        outcome = next(name for kind, name in _OUTCOMES if isinstance(problem, kind))
        self._requests.labels(outcome).inc()
        return outcome

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
