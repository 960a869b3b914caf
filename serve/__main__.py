"""Run an HTTP server that scores images: the command `python -m serve`.

Main entry: `main()`, the click command, loads the detector and serves until SIGTERM or Ctrl-C. All
options may be left out:

- `--host`, `--port`: the address, 127.0.0.1 and 8000 by default. Port 0 is any free one; a log line
  on standard error, "listening on http://HOST:PORT", has it.
- `--checkpoint`: folder of a checkpoint or run, or name of a shipped detector. Default: the newest
  run in the folder `--runs`, else the shipped detector.
- `--runs`: the folder of training runs (default: `runs` in the current folder).
- `--device`: auto (default: a GPU if there is one), cpu, cuda or cuda:N.
- `--batch-size`: the largest number of images that are scored at once (default 32).
- `--max-fpr`: the allowed share of real images that are called likely AI.
- `--max-miss`: the allowed share of AI images that are called no sign of AI. Both shares are above
  0 and below 0.5. The scores at which the verdict changes are computed from them. For a share that
  is not given, the checkpoint's own score is kept.
- `--max-mb`: the largest size of one request in MiB, 1 to 512 (default 50).
- `--max-files`: the largest number of images of one request (default 64).
- `--queue`: the largest number of images that wait or are scored, over all requests (default 256).
- `--timeout`: seconds until a request must be answered, at most 3600 (default 60).
- `--allow-urls` (no value; default: off): the server downloads images from URLs in a request. With
  `--allow-private-urls`, which needs `--allow-urls`, the URLs may be of private hosts.
- `--verbose`: more log lines.

The environment variable DETECTOR_API_KEY (`KEY`) has the API key; unset, none is required. A host
outside `LOOPBACK` without a key gets a warning. A wrong option, a `--max-files` above `--queue`, or
a key that is empty or not ASCII ends the command with exit code 2 (`click.UsageError`). A detector
that cannot be loaded or has no score for a share, a port in use or a missing package ends it with
one line and exit code 1.

POST /predict takes images and answers with JSON: a probability and a verdict for each.
`serve/api.py` defines this and the other routes.
"""

import os
from pathlib import Path

import click

import cli
import console
from installed import install_extra
from serve.limits import MB, Limits

KEY = "DETECTOR_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@click.command(cls=console.Command)
@cli.listen(port=8000, lowest=0)
@cli.options("max_fpr", "max_miss", "checkpoint_or_shipped", "runs", "device", "batch_size")
@click.option(
    "--max-mb",
    type=click.IntRange(1, 512),
    default=Limits.max_bytes // MB,
    show_default=True,
    help="Maximum size of one request, in MB.",
)
@click.option(
    "--max-files",
    type=click.IntRange(min=1),
    default=Limits.max_files,
    show_default=True,
    help="Maximum number of images in one request.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=Limits.queue,
    show_default=True,
    help="Maximum number of images that wait or are scored, over all requests. Further requests "
    "get status 429.",
)
@click.option(
    "--timeout",
    type=cli.FiniteRange(0, 3600, min_open=True),
    default=Limits.timeout_s,
    show_default=True,
    help="Maximum time until a request is answered, in seconds. After it, the status is 504.",
)
@click.option(
    "--allow-urls", is_flag=True, help="Accept http and https URLs of public hosts as images."
)
@click.option(
    "--allow-private-urls",
    is_flag=True,
    help="With --allow-urls, accept URLs of private hosts too.",
)
def main(
    host: str,
    port: int,
    max_fpr: float | None,
    max_miss: float | None,
    checkpoint: Path | None,
    runs: Path,
    device: str,
    batch_size: int,
    max_mb: int,
    max_files: int,
    queue: int,
    timeout: float,
    allow_urls: bool,
    allow_private_urls: bool,
) -> None:
    """Start an HTTP API that scores images as `predict` does.

    POST /predict takes one or many images; the page /docs describes the API. If the environment
    variable DETECTOR_API_KEY is set, requests must send this key.
    """
    if allow_private_urls and not allow_urls:
        raise click.UsageError("--allow-private-urls has no effect alone; add --allow-urls")
    if max_files > queue:
        raise click.UsageError(f"--max-files {max_files} is more than --queue {queue}")
    key = os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isascii()):
        raise click.UsageError(f"{KEY} is empty or not ASCII; set a key, or unset the variable")
    limits = Limits(
        max_bytes=max_mb * MB, max_files=max_files, queue=queue, timeout_s=timeout,
        batch_size=batch_size, allow_urls=allow_urls, allow_private_urls=allow_private_urls,
    )  # fmt: skip
    try:
        from serve.run import run
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
            raise
        raise click.ClickException(
            f"{error.name} is not installed; {install_extra('serve')}"
        ) from error
    if not key and host not in LOOPBACK:
        console.log.warning("no API key: anybody who can reach %s can use it; set %s", host, KEY)
    run(
        host, port, limits, (key or "").strip(), checkpoint=checkpoint, runs=runs, device=device,
        rates=(max_fpr, max_miss),
    )  # fmt: skip


if __name__ == "__main__":
    main()
