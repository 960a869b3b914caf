"""Load the detector and run the HTTP server until it is stopped.

Main entry: `run(host, port, limits, key, *, checkpoint, runs, device, rates)`. Only `rates` may be
left out.

- `host`: host name or IP address to listen on. `port`: its port (0: any free one).
- `limits`: a `Limits` of `serve/limits.py`, for one request and all together. `Limits()` has the
  defaults.
- `key`: the API key, ASCII text; "" if none is required.
- `checkpoint`: the `Path` of a checkpoint or run, or the name of a shipped detector as a `Path`.
  None: the newest run in the folder `runs`, else the shipped detector.
- `runs`: the `Path` of the folder of training runs.
- `device`: "auto", "cpu", "cuda" or "cuda:N".
- `rates`: a pair (highest false-positive rate, highest miss rate), which sets the limits of the
  verdicts. Each is above 0 and below 0.5, or None to keep the detector's limit. The default is
  (None, None).

Once it listens, `run()` returns nothing, after SIGTERM or Ctrl-C, when all accepted requests are
answered. While the detector is still loaded, SIGTERM ends the process, and Ctrl-C raises
KeyboardInterrupt. Errors:

- `OSError`: the address cannot be used (such as a port in use).
- `ValueError`: there is no such port, the detector is missing or damaged or its backbone was not
  fetched, the list of trusted C2PA signers is missing or damaged, a rate is out of range, or the
  detector has no threshold for it.
- `SystemExit`: a second signal stopped the server at once.
"""

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
    """Load the detector and answer requests until SIGTERM or Ctrl-C.

    `rates` are (max_fpr, max_miss) as `at_rates` takes them. None keeps the detector's own.

    Raises:
        OSError: the port is in use.
        ValueError: the port is outside 0 to 65535, or the detector or the C2PA trust list cannot be
            loaded.
    """
    with bound_socket(host, port) as sock:
        console.log.info("loading the detector")
        # Pillow decodes even with a GPU, because images arrive one at a time.
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
        raise SystemExit("stopped at once; some requests may have no answer")
    console.log.info("stopped; all requests were answered")
