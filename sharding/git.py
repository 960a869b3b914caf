"""Download the files of one commit of a Git repository with the `git` command, without a checkout.

Main entry: `extract(git, folder, work, mirror, progress, begin)` writes the selected files into
`folder` and returns an `Extracted`: `names`, their paths below `folder`, and `left_out`, a dict,
reason (a text such as "symbolic links") -> number of files left out.

- `git`: the `Git` entry of a catalog source, `catalog.sources[name].fetch.git`, or
  `Git(repository=..., commit=..., pattern=...)` of sharding/catalog.py: an address or an absolute
  folder, 40 hexadecimal digits and a regular expression for the paths of the files. Further fields,
  all optional: `below` (how the paths begin), `count` and `manifest_sha256` (expected number and
  hash of the files).
- `folder`: the `pathlib.Path` to write to; it is created if necessary.
- `work`: the `Path` of a Git directory, created only for a download. A later call resumes it.
- `mirror`: None, or the `Path` of a folder of local copies, each named OWNER+NAME. If the
  repository is among them, `extract()` reads the copy and downloads nothing; files that the copy
  lacks are left out. The same holds for a repository that is given as a folder.
- `progress`: `progress(label, total)` returns a context manager for a progress bar. It yields a
  function, which is called with the number of files finished since its last call.
- `begin`: a function that is called once, before the first file is written, with a dict: path of a
  file to write -> its size in bytes. Default: does nothing.

Errors are `FetchError` (a `ValueError`, of sharding/downloads.py; Git, network, wrong files, no
file left), and `OSError` or `ValueError` for `folder` (disk full, a link that leads out of it).
Nothing in the repository is executed: no checkout (thus no filter and no LFS smudge), no hook, no
submodule, no prompt. Each file that is written is checked against its object name, which the commit
determines.

`find_mirror(mirror, repository)` returns the Git directory of a copy, or None.
`manifest_sha256(entries)` is a hash of files (`Entry`: path, object name), which a catalog can
state. `counted(left_out)` formats counts for a message.
"""

import functools
import hashlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from escape import without_secrets
from sharding.downloads import FetchError
from sharding.fetch_spec import Git
from sharding.http import Progress
from storage import check_inside, naming, partial_of, whole_name

BATCH = 2000
"""Blobs per request: an interrupted download keeps the finished batches."""

PIECE = 2**20
"""Bytes to read at once."""

MOST_BYTES = 255
"""Maximum UTF-8 bytes of one part of a path, the limit of common file systems."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

LINKS, NAMES, POINTERS, ABSENT = (
    "symbolic links", "unsafe names", "LFS pointers", "files that the local copy lacks",
)  # fmt: skip

_SAFE = {
    "core.hooksPath": os.devnull, "credential.helper": "", "core.askPass": "",
    "core.fsmonitor": "false", "gc.auto": "0", "maintenance.auto": "false",
    "fetch.negotiationAlgorithm": "noop", "protocol.version": "2",
}  # fmt: skip


class Entry(NamedTuple):
    """One regular file of a commit."""

    path: str
    blob: str  # object name, 40 hexadecimal digits


@dataclass(frozen=True)
class Extracted:
    """Result of `extract`: the files in the folder, and counts of the excluded files by reason."""

    names: list[str]
    left_out: dict[str, int]


@dataclass(frozen=True)
class _Repository:
    """Git directory on this machine, the address of its remote, and the allowed protocols."""

    folder: Path
    address: str
    protocols: str

    def run(self, *words: str, text: str = "") -> bytes:
        """Run a git command in the repository and return what it prints.

        Raises:
            FetchError: git is missing, or the command failed.
        """
        try:
            done = subprocess.run(
                _command(self.folder, *words),
                input=text.encode(), capture_output=True, check=False,
                env=_environment(self.protocols),
            )  # fmt: skip
        except FileNotFoundError:
            raise _no_git() from None
        if done.returncode:
            raise FetchError(self._explain(done.stderr.decode(errors="replace")))
        return done.stdout

    @property
    def is_local(self) -> bool:
        """Whether nothing is downloaded."""
        return self.protocols == "none"

    @property
    def place(self) -> str:
        """Where the objects come from, for messages: an address, or a folder of this machine."""
        return str(self.folder) if self.is_local else without_secrets(self.address)

    def _explain(self, stderr: str) -> str:
        if re.search(
            "not our ref|unadvertised object|find remote ref|bad object|valid object|object info",
            stderr,
        ):
            if self.is_local and not self.address.startswith("/"):
                todo = "update it, or leave out --git-mirror"
                return f"the copy at {self.place} lacks the commit of the catalog; {todo}"
            return f"{self.place} has no such commit; correct `commit` in the catalog"
        lines = [line for line in stderr.splitlines() if line.startswith(("fatal:", "error:"))]
        reason = without_secrets((lines or stderr.splitlines() or ["no reason given"])[0])
        if self.is_local:
            return f"{self.place} cannot be read: {reason}; repair or update it"
        return f"download from {self.place} failed: {reason}; run the command again to resume"


def extract(
    git: Git,
    folder: Path,
    work: Path,
    mirror: Path | None,
    progress: Progress,
    begin: Callable[[dict[str, int]], None] = lambda _sizes: None,
) -> Extracted:
    """Write the files selected by `git` into `folder`, at their paths in the repository.

    `mirror` is searched first for a local copy (`find_mirror`). Otherwise the objects are
    downloaded to the Git directory `work`, which a later call uses to resume. Files in `folder`
    that already have the right bytes are kept. The sizes of the others are given to `begin` first.
    Partial files that killed calls left are deleted: `folder` must have one writer at a time.

    Raises:
        FetchError: git is missing, the network fails, the commit does not exist, or the files are
            not those that the catalog expects.
        OSError, ValueError: the disk fails, or a link leads out of `folder`.
    """
    local = _local_folder(git.repository, mirror)
    repository = _Repository(local or work, git.repository, "none" if local else "https:file")
    if not local:
        _download_commit(repository, git.commit)
    if repository.run("cat-file", "-t", git.commit).strip() != b"commit":
        raise FetchError(
            f"{without_secrets(git.repository)}: {git.commit} is not a commit; correct the catalog"
        )
    entries, left_out = _choose(
        git, repository.run("ls-tree", "-r", "-z", "--full-tree", git.commit)
    )
    for parent in {(folder / entry.path).parent for entry in entries}:
        check_inside(parent, folder)
        _remove_partial(parent)
    lacking = [entry for entry in entries if not _has_blob(folder / entry.path, entry.blob)]
    absent = _missing(repository, git.commit) & {entry.blob for entry in lacking}
    if not local:
        _download_blobs(repository, sorted(absent))
        absent = set()
    left_out[ABSENT] += sum(entry.blob in absent for entry in lacking)
    to_write = [entry for entry in lacking if entry.blob not in absent]
    begin(_sizes(repository, to_write))
    with progress(f"{folder.name}, files", len(entries)) as advance:
        advance(len(entries) - len(to_write))
        for entry in to_write:
            (folder / entry.path).parent.mkdir(parents=True, exist_ok=True)
        _write_blobs(repository, folder, to_write, advance)
    gone = {entry.path for entry in lacking if entry.blob in absent}
    names = [entry.path for entry in entries if entry.path not in gone]
    pointers = [name for name in names if _is_pointer(folder / name)]
    left_out[POINTERS] += len(pointers)
    for name in pointers:
        (folder / name).unlink()
    names = sorted(set(names) - set(pointers))
    if not names:
        raise FetchError(
            f"{without_secrets(git.repository)} has no usable file: {counted(left_out)}"
        )
    return Extracted(names, {reason: n for reason, n in sorted(left_out.items()) if n})


def counted(left_out: Mapping[str, int]) -> str:
    """Format the counts of excluded files for a message."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)


def find_mirror(mirror: Path, repository: str) -> Path | None:
    """Return the Git directory of a repository in a folder of mirrors, or None.

    The Git directory is the folder OWNER+NAME itself, or `.git`, `repo` or `repo/.git` in it.
    """
    parts = urlsplit(repository).path.strip("/").removesuffix(".git").split("/")
    place = mirror / "+".join(parts[-2:])
    folders = (place, place / ".git", place / "repo", place / "repo" / ".git")
    return next((each for each in folders if (each / "HEAD").is_file()), None)


def _local_folder(repository: str, mirror: Path | None) -> Path | None:
    """Return the Git directory of the repository on this machine, or None."""
    if mirror and (folder := find_mirror(mirror, repository)):
        return folder
    if not repository.startswith("/"):
        return None
    path = Path(repository)
    return path / ".git" if (path / ".git" / "HEAD").is_file() else path


def _command(folder: Path, *words: str) -> list[str]:
    settings = [text for key, value in _SAFE.items() for text in ("-c", f"{key}={value}")]
    return ["git", *settings, "--git-dir", str(folder), *words]


def _environment(protocols: str) -> dict[str, str]:
    """Return git's environment: no GIT variables of the caller, no prompts, English messages."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return kept | {
        "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "", "SSH_ASKPASS": "", "LC_ALL": "C",
        "GIT_ALLOW_PROTOCOL": protocols, "GIT_LFS_SKIP_SMUDGE": "1", "GIT_OPTIONAL_LOCKS": "0",
    }  # fmt: skip


def _no_git() -> FetchError:
    return FetchError("sources of the kind `git` need the git command; install git and run again")


# --- the download ---------------------------------------------------------------------------------

_FETCH = (
    "fetch", "--quiet", "--filter=blob:none", "--no-tags", "--no-write-fetch-head",
    "--recurse-submodules=no",
)  # fmt: skip


def _download_commit(repository: _Repository, commit: str) -> None:
    """Fetch the commit and its trees. A server without filters sends the blobs too."""
    if not (repository.folder / "HEAD").is_file():
        repository.run("init", "--quiet", "--bare", "--template=", str(repository.folder))
    for lock in repository.folder.rglob("*.lock"):  # a killed download left it
        lock.unlink()
    repository.run(*_FETCH, "--depth=1", "--", repository.address, commit)


def _download_blobs(repository: _Repository, blobs: Sequence[str]) -> None:
    for start in range(0, len(blobs), BATCH):
        wanted = "".join(f"{blob}\n" for blob in blobs[start : start + BATCH])
        repository.run(*_FETCH, "--stdin", "--", repository.address, text=wanted)


def _missing(repository: _Repository, commit: str) -> set[str]:
    """Return the objects of a commit that are missing in the Git directory."""
    listed = repository.run("rev-list", "-1", "--objects", "--missing=print", commit)
    return {line[1:41].decode() for line in listed.splitlines() if line.startswith(b"?")}


def _sizes(repository: _Repository, entries: Sequence[Entry]) -> dict[str, int]:
    """Return the size of each file. Its blob must be in the Git directory."""
    blobs = "".join(f"{entry.blob}\n" for entry in entries)
    sizes = repository.run("cat-file", "--batch-check=%(objectsize)", text=blobs).split()
    return {entry.path: int(size) for entry, size in zip(entries, sizes, strict=True)}


# --- which files ----------------------------------------------------------------------------------


def _choose(git: Git, tree: bytes) -> tuple[list[Entry], Counter[str]]:
    """Select regular files in the output of `ls-tree -z`, and count the excluded files."""
    pattern, left_out, entries = re.compile(git.pattern), Counter[str](), []
    for line in tree.split(b"\0")[:-1]:
        facts, _, name = line.partition(b"\t")
        mode, kind, blob = facts.decode().split()
        path = name.decode("utf-8", "replace")
        if kind != "blob" or not path.startswith(git.below) or not pattern.search(path):
            continue
        if mode == "120000":
            left_out[LINKS] += 1
        elif not _is_safe(path):
            left_out[NAMES] += 1
        else:
            entries.append(Entry(path, blob))
    where = f"{without_secrets(git.repository)} at {git.commit[:12]}"
    rule = f"below = {git.below!r}, pattern = {git.pattern!r}"
    if not entries:
        raise FetchError(f"{where}: no file matches {rule}; correct the catalog")
    if git.count and len(entries) != git.count:
        raise FetchError(
            f"{where}: {len(entries):,} files match {rule}, the catalog expects {git.count:,}; "
            "correct the count or the rule"
        )
    digest = manifest_sha256(entries)
    if git.manifest_sha256 and digest != git.manifest_sha256:
        raise FetchError(
            f"{where}: the files that match {rule} have manifest_sha256 {digest[:12]}..., the "
            f"catalog says {git.manifest_sha256[:12]}...; correct the hash or the rule"
        )
    return entries, left_out


def manifest_sha256(entries: Sequence[Entry]) -> str:
    """Return the SHA-256 of the sorted lines `<object name> <path>` of the files."""
    lines = sorted(f"{entry.blob} {entry.path}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_safe(path: str) -> bool:
    """Return whether a path stays below its folder on every system and has no hidden part."""
    return all(
        part
        and not part.startswith(".")
        and len(part.encode()) <= MOST_BYTES
        and not re.search(r"[\x00-\x1f\x7f\\:\ufffd]", part)
        for part in path.split("/")
    )


# --- the bytes of files ---------------------------------------------------------------------------


def _blob_name(size: int) -> "hashlib._Hash":
    """Start the hash of a blob's object name, a SHA-1, with the header of the blob."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _has_blob(path: Path, blob: str) -> bool:
    """Return whether a file has the bytes of a blob."""
    if path.is_symlink() or not path.is_file():
        return False
    name = _blob_name(path.stat().st_size)
    with path.open("rb") as stream:
        for piece in iter(functools.partial(stream.read, PIECE), b""):
            name.update(piece)
    return name.hexdigest() == blob


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(LFS_POINTER)) == LFS_POINTER


def _write_blobs(
    repository: _Repository, folder: Path, entries: Sequence[Entry], advance: Callable[..., None]
) -> None:
    """Write each blob to its path; a file gets its name only when complete."""
    command = _command(repository.folder, "cat-file", "--batch")
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=_environment(repository.protocols),
        )  # fmt: skip
    except FileNotFoundError:
        raise _no_git() from None
    with process:
        try:
            for entry in entries:
                path = folder / entry.path
                with naming(path):
                    _write_blob(path, entry, _read_blob(process, entry, repository.place))
                advance(1)
        finally:
            process.kill()


def _read_blob(process: subprocess.Popen[bytes], entry: Entry, place: str) -> Iterator[bytes]:
    """Read a blob from `git cat-file --batch`; yield its size as 8 bytes, then its pieces."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{entry.blob}\n".encode())
    process.stdin.flush()
    header = process.stdout.readline().split()
    if len(header) != 3 or header[1] != b"blob":
        raise FetchError(f"{place}: {entry.path} cannot be read; run the command again")
    left = int(header[2])
    yield left.to_bytes(8, "big")
    while left:
        piece = process.stdout.read(min(left, PIECE))
        if not piece:
            raise FetchError(f"{place}: {entry.path} ended early; run the command again")
        left -= len(piece)
        yield piece
    process.stdout.read(1)


def _remove_partial(folder: Path) -> None:
    """Delete the partial files of `_write_blob` that killed processes left in a folder."""
    for left in folder.glob(".*.partial"):
        if re.fullmatch(r"\.[0-9a-f]{40}", whole_name(left.name) or ""):
            left.unlink()


def _write_blob(path: Path, entry: Entry, pieces: Iterator[bytes]) -> None:
    name = _blob_name(int.from_bytes(next(pieces), "big"))
    partial = partial_of(path.with_name(f".{entry.blob}"))  # the file's own name may be too long
    try:
        with partial.open("wb") as stream:
            for piece in pieces:
                name.update(piece)
                stream.write(piece)
        if name.hexdigest() != entry.blob:
            raise FetchError(f"{entry.path} does not match its object name; run the command again")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
