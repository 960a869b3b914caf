"""Start the HTTP API: `python -m serve`.

What takes seconds to load (torch, FastAPI) is imported inside the function, after the command line
has been checked.
"""

import os
from pathlib import Path

import click

import console
from installed import install_extra
from serve.limits import MB, Limits

KEY = "DETECTOR_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@click.command(cls=console.Command)
@console.listen(port=8000, lowest=0)
@console.options("max_fpr", "max_miss", "checkpoint", "runs", "device", "batch_size")
@click.option(
    "--max-mb",
    type=click.IntRange(1, 512),
    default=Limits.max_bytes // MB,
    show_default=True,
    help="Megabytes of one request.",
)
@click.option(
    "--max-files",
    type=click.IntRange(min=1),
    default=Limits.max_files,
    show_default=True,
    help="Images of one request.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=Limits.queue,
    show_default=True,
    help="Images of all requests that may wait; a request that does not fit gets 429.",
)
@click.option(
    "--timeout",
    type=console.FiniteRange(0, 3600, min_open=True),
    default=Limits.timeout_s,
    show_default=True,
    help="Seconds until a request is answered, with 504 if with nothing else.",
)
@click.option(
    "--allow-urls", is_flag=True, help="Fetch images from public http and https addresses."
)
@click.option(
    "--allow-private-urls", is_flag=True, help="With --allow-urls: from this network too."
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
    """Answer HTTP requests with what `predict.py` says of images.

    POST /predict takes one or many images, /docs describes it. Where the environment variable
    DETECTOR_API_KEY is set, requests must have that key.
    """
    if allow_private_urls and not allow_urls:
        raise click.UsageError("--allow-private-urls says which addresses; add --allow-urls")
    if max_files > queue:
        raise click.UsageError(f"--max-files {max_files} never fit into --queue {queue}")
    key = os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isascii()):
        raise click.UsageError(f"{KEY} is empty or not ASCII; set a key, or unset it for none")
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
        console.log.warning("no API key: whoever reaches %s may send images (%s)", host, KEY)
    run(
        host, port, limits, (key or "").strip(), checkpoint=checkpoint, runs=runs, device=device,
        rates=(max_fpr, max_miss),
    )  # fmt: skip


if __name__ == "__main__":
    main()
