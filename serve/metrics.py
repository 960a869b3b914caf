"""Define the Prometheus metrics of the server, which `GET /metrics` returns.

Main entry: `ServerMetrics()` takes nothing. It has `registry`, a `CollectorRegistry` of
prometheus_client of its own, and one attribute per metric. The other modules of `serve` update
them, such as `metrics.requests.labels("/predict", "200").inc()`:

- `requests`: counter, by path and status (texts).
- `seconds`: histogram of the seconds of a request, by path.
- `images`: counter, by verdict.
- `waiting`: gauge, images that wait or are scored now.
- `held`: gauge, bytes of memory reserved for request bodies.
- `batch_images`, `batch_seconds`: histograms of the images of a scored batch, and of the seconds
  that the network took for it.

`SECONDS` and `IMAGES` are the bounds of the histogram buckets.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Metrics of one server, in their own registry."""

    def __init__(self) -> None:
        to = self.registry = CollectorRegistry()
        self.requests = Counter(
            "detector_requests", "Requests that were answered.", ["path", "status"], registry=to
        )
        self.seconds = Histogram(
            "detector_request_seconds", "Seconds from the head of a request to its full answer.",
            ["path"], buckets=SECONDS, registry=to,
        )  # fmt: skip
        self.images = Counter(
            "detector_images", "Images that were answered.", ["verdict"], registry=to
        )
        self.waiting = Gauge(
            "detector_queue_images", "Images that wait or are scored now.", registry=to
        )
        self.held = Gauge(
            "detector_held_bytes", "Bytes of memory reserved for request bodies.", registry=to
        )
        self.batch_images = Histogram(
            "detector_batch_images", "Images per scored batch.", buckets=IMAGES,
            registry=to,
        )  # fmt: skip
        self.batch_seconds = Histogram(
            "detector_batch_seconds", "Seconds that the network took for a batch.", buckets=SECONDS,
            registry=to,
        )  # fmt: skip
