"""One server from its start to its end."""

from pathlib import Path

import console
from model import load_detector
from serve.api import Service, make_app
from serve.guard import Guard
from serve.limits import Limits
from serve.server import Server, bound_socket


def run(
    host: str, port: int, limits: Limits, key: str, *, checkpoint: Path | None, runs: Path,
    device: str, rates: tuple[float | None, float | None] = (None, None),
) -> None:  # fmt: skip
    """Load the detector, then answer requests until a signal ends it. `rates` are the largest
    shares of real images called likely AI and of fakes called no sign of AI; None keeps the
    detector's own.

    Raises:
        OSError: the port is taken.
        ValueError: the detector cannot be loaded, or the C2PA trust list not be used.
    """
    with bound_socket(host, port) as sock:
        console.log.info("loading the detector")
        # Pillow decodes, on a GPU too: images come one at a time.
        detector = load_detector(checkpoint, runs=runs, device=device, backend="pil")
        if rates != (None, None):
            detector = detector.at_rates(*rates)
        service = Service(detector, limits)
        console.log.info("checkpoint: %s", detector.identity)
        for notice in detector.notices:
            console.log.warning("%s", notice.text)
        if service.scorer.trust:
            console.log.info("C2PA trust list: %s", service.scorer.trust.describe())
        server = Server(Guard(make_app(service), service, key), service)
        try:
            server.run(sockets=[sock])
        finally:
            service.close()
    if server.force_exit:
        raise SystemExit("stopped at once; requests may have had no answer")
    console.log.info("stopped; every request has its answer")
