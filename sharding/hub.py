"""Ask the model hub (Hugging Face) within seconds, before its client downloads. Where no answer
comes, the client retries for a minute, or waits for ever.

A question has `HF_HUB_ETAG_TIMEOUT` seconds (default: 10), over all IP addresses of the hub. A
`repository` is OWNER/NAME, and a `revision` a commit, a branch, a tag or None (the main branch).
`proxy_faults()` is a context manager for other calls of the hub's client.
The hub's client is imported in functions: its import takes most of a second.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from escape import reason_of, typed_reason_of
from interrupts import within
from web_addresses import proxy_fault


def hub_errors() -> tuple[type[Exception], ...]:
    """Return the errors of the hub's client, for `except hub_errors()`."""
    from huggingface_hub.errors import HFValidationError, HTTPError

    # HTTPError covers every HTTP client that a version of the library uses. The Xet transfer may
    # raise RuntimeError.
    return OSError, HTTPError, HFValidationError, RuntimeError


@contextlib.contextmanager
def proxy_faults() -> Iterator[None]:
    """Raise OSError with advice where the hub's client refuses a proxy of the environment: its own
    errors for this are none of `hub_errors()`.

    Raises:
        OSError: a variable names a proxy that the client cannot use.
    """
    try:
        yield
    except Exception as error:
        if fault := proxy_fault(typed_reason_of(error)):
            raise OSError(fault) from None
        if type(error).__name__ == "InvalidURL" and not isinstance(error, OSError):  # of httpx
            raise OSError(
                "the proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used "
                f"({reason_of(error)})"
            ) from None
        raise


def ask_hub(repository: str, file: str, revision: str | None) -> int | None:
    """Return the size of a file on the hub in bytes, or None if the hub does not say it.

    Raises:
        hub_errors(): the hub does not answer in time, or has no such file (`HfHubHTTPError`).
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url, seconds = hf_hub_url(repository, file, revision=revision), constants.HF_HUB_ETAG_TIMEOUT
    with proxy_faults():
        return within(seconds, lambda: get_hf_file_metadata(url, timeout=seconds).size)


def in_hub_cache(repository: str, file: str, revision: str | None) -> Path | None:
    """Return the path of a file in the hub's cache on this machine, or None.

    Raises:
        hub_errors(): `repository` is no name of the hub.
    """
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def fetch_folder(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Return the folder with the files of a repository that match `patterns`, in the hub's cache.
    Missing ones are downloaded. If the hub does not answer, the cached ones are used.

    Raises:
        hub_errors(): the hub does not answer in time and the cache lacks the files, or the
            download failed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    silent: Exception | None = None
    try:
        ask_hub(repository, "config.json", revision)
    except HfHubHTTPError:
        pass  # an answer, whatever it says
    except hub_errors() as error:
        silent = error
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=list(patterns),
            local_files_only=silent is not None,
        )  # fmt: skip
    except LocalEntryNotFoundError:
        if silent is None:
            raise
        raise silent from None
    return Path(folder)
