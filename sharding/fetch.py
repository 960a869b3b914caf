"""Download the raw files of catalog sources from the Hugging Face hub, Kaggle, Git or the web.

Main entry: `fetch_all(catalog, raw, names, progress, git_mirror)` is an iterator. It downloads one
source after the other, each to a folder below `raw`, and yields a `Fetched` for each.

- `catalog`: a `Catalog`, from `read_catalog()` of `sharding/catalog.py`.
- `raw`: the folder of all raw datasets, a `Path`.
- `names`: the names of the sources to fetch. The default () means all sources with a `fetch` entry
  in the catalog. A named source without one gets the status "by hand". A name that is not in the
  catalog raises `CatalogError`.
- `progress`: `progress(label, total or None)` returns a context manager that yields `f`; `f(n)` is
  called for n more MiB (web) or files (Git). Default: no progress of these is shown. The libraries
  of the hub and of Kaggle show their own.
- `git_mirror`: the `Path` of a folder with copies of Git repositories, each named OWNER+NAME, or
  None (default). A repository that has a copy there is read from it; any other is downloaded.

Fields of a `Fetched`: `source` (its name), `status` ("complete": nothing was left to do,
"downloaded", "by hand": a person must do it, "failed"), and `note` (the folder, what to do, or the
error, which is not raised). `fetch_source(name, source, raw, progress, git_mirror)` fetches one
`Source` and returns its `Fetched`.
"""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import requests

import console
from escape import reason_of, typed_reason_of, without_secrets
from installed import why_not_imported
from locks import locked
from sharding.catalog import Catalog, CatalogError, Source
from sharding.downloads import FetchError, check_content, check_hash
from sharding.fetch_spec import BEGUN, Fetch, Git
from sharding.git import ABSENT, counted, extract
from sharding.http import TIMEOUT_S, Progress, Remote, ask, download, size_of
from sharding.hub import hub_errors, proxy_faults
from storage import check_inside, parse_json, publish, read_text, sha256_of, whole_name, write_text
from web_addresses import proxy_fault

MARK = ".fetched.json"


@dataclass(frozen=True)
class Fetched:
    """Result of fetching one source; `note` is its folder, what to do by hand, or the error."""

    source: str
    status: Literal["complete", "downloaded", "by hand", "failed"]
    note: str


def _no_progress(_label: str, _total: int | None) -> AbstractContextManager[Callable[..., None]]:
    return contextlib.nullcontext(lambda *_: None)


def fetch_all(
    catalog: Catalog,
    raw: Path,
    names: Sequence[str] = (),
    progress: Progress = _no_progress,
    git_mirror: Path | None = None,
) -> Iterator[Fetched]:
    """Fetch the named sources, or all with a `fetch` entry, each when its result is requested.

    Raises:
        CatalogError: an unknown name; raised before any download.
    """
    if unknown := sorted(set(names) - catalog.sources.keys()):
        raise CatalogError(
            f"no source {', '.join(unknown)}; the catalog has {', '.join(catalog.sources)}"
        )
    chosen = names or [name for name, source in catalog.sources.items() if source.fetch]
    return (
        fetch_source(name, catalog.sources[name], raw, progress, git_mirror)
        for name in dict.fromkeys(chosen)
    )


def fetch_source(
    name: str,
    source: Source,
    raw: Path,
    progress: Progress = _no_progress,
    git_mirror: Path | None = None,
) -> Fetched:
    """Fetch one source into its folder below `raw`.

    Errors of the network, the disk or a login are not raised but returned as "failed", so that
    other sources can follow. A repository in `git_mirror` (`sharding.git.find_mirror`) is read
    there instead of downloaded.
    """
    target = (raw / (source.root or name)).absolute()
    fetch = source.fetch
    if fetch is None or fetch.by_hand:
        todo = fetch.by_hand if fetch else f"no download is known ({source.homepage or 'no page'})"
        return Fetched(name, "by hand", f"{todo.strip()} Put it in {target}")
    try:
        check_inside(target, raw.absolute())
        if _is_complete(target, fetch):
            return Fetched(name, "complete", str(target))
        note = str(target)
        with _alone(target):
            if fetch.hub:
                _from_hub(fetch, target)
            elif fetch.git:
                note += _from_git(fetch, fetch.git, target, git_mirror, progress)
            elif fetch.kaggle:
                _from_kaggle(fetch, target)
            else:
                _from_urls(fetch, target, progress)
    except (OSError, ValueError) as error:
        return Fetched(name, "failed", reason_of(error, longest=1000))
    return Fetched(name, "downloaded", note)


# --- shared by all kinds of downloads -------------------------------------------------------------


def _wanted(fetch: Fetch) -> dict[str, Any]:
    """Return the `fetch` entry as stored in MARK and BEGUN, without secrets."""
    wanted = {key: value for key, value in asdict(fetch).items() if value}
    return wanted | ({"urls": [without_secrets(url) for url in fetch.urls]} if fetch.urls else {})


_KINDS = {"fetch": dict, "files": dict, "versions": dict, "left_out": dict, "revision": str}
"""Types of the entries of MARK and BEGUN that are read again. An entry may be missing or null."""


def _read(path: Path) -> dict[str, Any]:
    """Return the content of MARK or BEGUN; empty if there is no such file or it is damaged."""
    try:
        content = parse_json(read_text(path))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    entries = {key: value for key, value in content.items() if value is not None}
    whole = all(isinstance(entries.get(key, kind()), kind) for key, kind in _KINDS.items())
    return entries if whole else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def _is_complete(target: Path, fetch: Fetch) -> bool:
    """Return whether the download finished and all its files still exist at their sizes. It is not
    complete if another download has begun since, or if a local copy of a Git repository lacked
    files, which the copy or the remote repository may have now.
    """
    mark = _read(target / MARK)
    files = mark.get("files") or {}
    if ABSENT in (mark.get("left_out") or {}) or (target / BEGUN).exists():
        return False
    return bool(files) and mark.get("fetch") == _wanted(fetch) and not _lacking(target, files)


def _begin(target: Path, fetch: Fetch, files: Mapping[str, int | None], **facts: object) -> None:
    """Write BEGUN, with the sizes of the files to download and of those that earlier tries began:
    `_finish` deletes the ones that the catalog no longer names.
    """
    begun = _read(target / BEGUN).get("files") or {}
    _write(target / BEGUN, {"fetch": _wanted(fetch), "files": {**begun, **files}, **facts})


def _own(target: Path) -> dict[str, int | None]:
    """Return the names and sizes of the files that this command wrote or began to write."""
    marks = [_read(target / name).get("files") or {} for name in (MARK, BEGUN)]
    return marks[0] | marks[1]


def _finish(folder: Path, fetch: Fetch, names: Iterable[str], **facts: object) -> None:
    """Check the hashes given in the catalog, then write MARK and delete BEGUN."""
    files = {name: (folder / name).stat().st_size for name in sorted(names)}
    if unknown := sorted(fetch.sha256.keys() - files.keys()):
        raise FetchError(
            f"no file {', '.join(unknown)} was downloaded, but the catalog has its sha256"
        )
    for name, digest in fetch.sha256.items():
        check_hash(folder / name, digest)
    _remove_earlier(folder, files)
    _write(folder / MARK, {"fetch": _wanted(fetch), "files": files, **facts})
    (folder / BEGUN).unlink(missing_ok=True)


def _remove_earlier(folder: Path, files: Mapping[str, int]) -> None:
    """Delete the files of an earlier download, also of an unfinished one, that are not among
    `files`, such as files of another commit: a build would pack them. Files that have changed since
    are kept.
    """
    before = _own(folder)
    gone = [
        folder / name for name in sorted(before.keys() - files.keys())
        if (folder / name).is_file() and size_of(folder / name) == before[name]
    ]  # fmt: skip
    for path in gone:
        check_inside(path, folder)
        path.unlink()
    if gone:
        console.log.info(
            "%s: %s of an earlier download deleted, which the catalog no longer names",
            folder.name, console.counted(len(gone), "file"),
        )  # fmt: skip


@contextlib.contextmanager
def _explained(page: str, login: str, begun: Path, *also: type[Exception]) -> Iterator[None]:
    """Turn errors of the network, the disk or a library (`also`) into a clear `FetchError`."""
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except FetchError:
        raise
    except kinds as error:
        responses = [getattr(each, "response", None) for each in (error, error.__cause__)]
        status = next((each.status_code for each in responses if each is not None), None)
        anew = f", or delete {begun} to start over" if begun.exists() else ""
        if status in (401, 403):
            raise FetchError(f"{page} refuses access (HTTP {status}): {login}") from error
        if status == 404:
            todo = f"correct its address in the catalog{anew}"
            raise FetchError(f"{page} does not exist (HTTP 404); {todo}") from error
        cause = proxy_fault(typed_reason_of(error)) or error.__cause__ or error
        reason = f"HTTP {status}" if status else cause
        raise FetchError(
            f"download from {page} failed: {reason}; run the command again to resume{anew}"
        ) from error


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Lock a folder for one download: two would write into each other's unfinished files.

    Then delete partial files of BEGUN and MARK: only killed processes leave them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    busy = FetchError(f"another fetch is writing {target}; wait for it to end")
    with locked(target.with_name(f".{target.name}.lock"), busy):
        _remove_partial(target)
        yield


def _remove_partial(folder: Path) -> None:
    """Delete the partial files of BEGUN and MARK that killed processes left."""
    for left in folder.glob("*.partial"):
        if whole_name(left.name) in (BEGUN, MARK):
            left.unlink(missing_ok=True)


def _check_space(target: Path, needed: int) -> None:
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise FetchError(
            f"the download needs {needed / 2**30:.2f} GiB, but the disk of {target} has only "
            f"{free / 2**30:.2f} GiB free; free some space, or choose another folder with --raw"
        )


def _matching(names: Iterable[str], patterns: list[str], where: str) -> list[str]:
    """Return the names that match a pattern; `*` also matches `/`. Without patterns, return all."""
    from huggingface_hub.utils import filter_repo_objects

    names = list(names)
    matching = list(filter_repo_objects(names, allow_patterns=patterns or None))
    if not matching:
        there = sorted({name.partition("/")[0] for name in names})
        raise FetchError(
            f"{where} has no file that matches {', '.join(patterns) or '*'}; it has "
            f"{', '.join(there[:8]) or 'no file'}; correct `files` in the catalog"
        )
    return matching


# --- the Hugging Face hub -------------------------------------------------------------------------


def _from_hub(fetch: Fetch, target: Path) -> None:
    """Download the matching files of one revision; a resumed download keeps its revision.

    Complete files are kept. A new process starts incomplete files again, because the hub library
    keeps no parts of them.
    """
    # The import takes most of a second.
    from huggingface_hub import HfApi, constants, snapshot_download

    before = _read(target / BEGUN) or _read(target / MARK)
    same = before.get("fetch", {}).get("hub") == fetch.hub
    revision = before.get("revision") if same else None
    explained = functools.partial(
        _explained,
        f"{constants.ENDPOINT}/datasets/{fetch.hub}",
        "the dataset is gated, private or misspelled. Accept its terms on that page, then log in "
        "with `hf auth login` or set HF_TOKEN",
        target / BEGUN,
        *hub_errors(),
    )
    with explained(), proxy_faults():
        # No retries here, unlike the download: without a network, fail now and not after a minute.
        info = HfApi().dataset_info(
            fetch.hub, revision=revision, files_metadata=True, timeout=TIMEOUT_S[0]
        )
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    names = _matching(sizes, fetch.files, f"{fetch.hub} on the hub")
    wanted = {name: sizes[name] for name in names}
    to_write = {name: sizes[name] for name in _lacking(target, wanted)}
    _check_space(target, sum(size or 0 for size in to_write.values()))
    target.mkdir(exist_ok=True)
    _begin(target, fetch, to_write, revision=info.sha)
    # A killed download leaves these files, and the library never uses their names again.
    for orphan in (target / ".cache" / "huggingface").rglob("*.*.*.incomplete"):
        orphan.unlink()
    with explained():
        snapshot_download(
            fetch.hub, repo_type="dataset", revision=info.sha, local_dir=target,
            allow_patterns=fetch.files or None,
        )  # fmt: skip
    # If the hub fails midway, the library may return without an error.
    if lacking := _lacking(target, wanted):
        raise FetchError(
            f"{len(lacking)} of {len(names)} files of {fetch.hub} are incomplete, first "
            f"{lacking[0]}; run the command again to resume"
        )
    _finish(target, fetch, names, revision=info.sha)


def _lacking(target: Path, sizes: Mapping[str, int | None]) -> list[str]:
    """Return the names of files that are missing or have another size."""
    return [
        name
        for name, size in sizes.items()
        if not (target / name).is_file() or size not in (None, (target / name).stat().st_size)
    ]


def _from_git(
    fetch: Fetch, repository: Git, target: Path, mirror: Path | None, progress: Progress
) -> str:
    """Download the files of one commit; return the end of a note with its file counts."""
    target.mkdir(exist_ok=True)
    work = target.with_name(f".{target.name}.git")
    begin = functools.partial(_begin, target, fetch)
    begin({})
    extracted = extract(repository, target, work, mirror, progress, begin)
    _finish(target, fetch, extracted.names, left_out=extracted.left_out)
    shutil.rmtree(work, ignore_errors=True)
    left_out = counted(extracted.left_out)
    return f" ({len(extracted.names):,} files{'; left out: ' if left_out else ''}{left_out})"


# --- Kaggle ---------------------------------------------------------------------------------------


def _from_kaggle(fetch: Fetch, target: Path) -> None:
    """Download the whole archive, unpack it, and keep only the matching files.

    Kaggle gives all files only as one archive. Its size is unknown before, so free disk space is
    not checked.
    """
    try:
        import kagglehub
        from kagglehub import exceptions
    except ImportError as error:
        raise FetchError(
            f"Kaggle downloads need kagglehub; {why_not_imported(error, 'fetch')}"
        ) from None
    if (target / MARK).exists():
        raise FetchError(
            f"{target} is of an earlier download, which lacks files or is not what the catalog "
            "says now; delete it to fetch the dataset anew"
        )
    if target.exists() and any(target.iterdir()):
        raise FetchError(
            f"{target} already has files that this command did not write; build them as they are, "
            "or move them away to fetch the dataset"
        )
    # With an output_dir the library deletes an unfinished download; with its cache it resumes one.
    # The cache is next to the target, so that the result only has to be renamed.
    work = target.with_name(f".{target.name}.kaggle")
    logging.getLogger("kagglehub").setLevel(logging.WARNING)  # its log goes to standard output
    explained = _explained(
        f"https://www.kaggle.com/datasets/{fetch.kaggle}",
        "accept its terms on that page, make a token at https://www.kaggle.com/settings, and put "
        "it in ~/.kaggle/kaggle.json, KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY",
        work,
        exceptions.BackendError,
        exceptions.CredentialError,
        exceptions.DataCorruptionError,
        zipfile.BadZipFile,
        ValueError,  # raised for a file that is no archive
    )
    with explained, _kaggle_cache(work):
        folder = Path(kagglehub.dataset_download(fetch.kaggle))
        earlier = (_read(folder / BEGUN) or _read(folder / MARK)).get("fetch", {}).get("files")
        if earlier and earlier != fetch.files:  # an earlier try deleted unwanted files
            folder = Path(kagglehub.dataset_download(fetch.kaggle, force_download=True))
    _remove_partial(folder)
    inside = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    names = _matching(inside.keys() - {MARK, BEGUN}, fetch.files, f"{fetch.kaggle} on Kaggle")
    _begin(folder, fetch, {})
    for name in inside.keys() - {*names, MARK, BEGUN}:
        inside[name].unlink()
    _finish(folder, fetch, names, revision=folder.name)
    publish(folder, target)
    shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _kaggle_cache(folder: Path) -> Iterator[None]:
    """Set the cache folder of the library, which it reads only from the environment.

    DISABLE_KAGGLE_CACHE and DISABLE_COLAB_CACHE: in notebooks the library would return a read-only
    folder.
    """
    ours = {
        "KAGGLEHUB_CACHE": str(folder), "DISABLE_KAGGLE_CACHE": "1", "DISABLE_COLAB_CACHE": "1",
    }  # fmt: skip
    before = {key: os.environ.get(key) for key in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            os.environ.update({key: value} if value is not None else {})


# --- plain addresses ------------------------------------------------------------------------------


def _from_urls(fetch: Fetch, target: Path, progress: Progress) -> None:
    """Download each address as one file, in the order of the catalog."""
    by_hand = f"download it by hand, to {target}"
    names = [_file_name(url) for url in fetch.urls]
    if len(set(names)) < len(names):
        raise FetchError(f"two addresses have the same file name in {target}: {', '.join(names)}")
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # lengths of the plain file
        remotes = []
        for url, name in zip(fetch.urls, names, strict=True):
            with _explained(url, by_hand, target / BEGUN):
                remotes.append(ask(session, url, target / name, fetch.sha256.get(name, "")))
        begun = _read(target / BEGUN).get("versions", {})
        for remote in remotes:
            if not remote.version or begun.get(remote.path.name) != remote.version:
                remote.partial.unlink(missing_ok=True)  # perhaps of another version
        lacking = [
            each for each in remotes
            if each.size is None
            or size_of(each.path) != each.size
            or _is_outdated(each, _own(target))
        ]  # fmt: skip
        _check_space(target, sum((each.size or 0) - size_of(each.partial) for each in lacking))
        target.mkdir(exist_ok=True)
        versions = {each.path.name: each.version for each in remotes}
        _begin(target, fetch, {each.path.name: each.size for each in lacking}, versions=versions)
        for remote in lacking:
            with _explained(remote.url, by_hand, remote.partial):
                download(session, remote, progress)
    for remote in remotes:
        check_content(remote.path, "")
    _finish(target, fetch, names, versions=versions)


def _is_outdated(remote: Remote, own: Mapping[str, int | None]) -> bool:
    """Return whether a file of the right size has another hash than in the catalog.

    Raises:
        FetchError: the hash differs, and this command did not write the file.
    """
    if not remote.sha256 or sha256_of(remote.path) == remote.sha256:
        return False
    if remote.path.name not in own:
        raise FetchError(
            f"{remote.path} has not the sha256 of the catalog, and this command did not write it; "
            "move it away to download the file, or correct the catalog"
        )
    return True


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path.rpartition("/")[2])
    if not name or name.startswith(".") or re.search(r"[/\\:\0]", name):
        raise FetchError(f"{url} does not end in a file name; correct the catalog")
    return name
