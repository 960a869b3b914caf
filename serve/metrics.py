"""What Prometheus reads: `GET /metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        to = self.registry = CollectorRegistry()
        self.requests = Counter(
            "detector_requests", "Requests that were answered.", ["path", "status"], registry=to
        )
        self.seconds = Histogram(
            "detector_request_seconds", "From the head of a request to the end of its answer.",
            ["path"], buckets=SECONDS, registry=to,
        )  # fmt: skip
        self.images = Counter(
            "detector_images", "Images that were answered.", ["verdict"], registry=to
        )
        self.waiting = Gauge(
            "detector_queue_images", "Images that wait or are looked at.", registry=to
        )
        self.held = Gauge(
            "detector_held_bytes", "What request bodies take of the memory for them.", registry=to
        )
        self.batch_images = Histogram(
            "detector_batch_images", "Images that were scored at a time.", buckets=IMAGES,
            registry=to,
        )  # fmt: skip
        self.batch_seconds = Histogram(
            "detector_batch_seconds", "What the network took for a batch.", buckets=SECONDS,
            registry=to,
        )  # fmt: skip
