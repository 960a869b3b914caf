"""Files of one commit of a Git repository, read by the `git` command without a checkout.

Nothing of the repository is executed: no checkout (so no filter, no LFS smudge), no hook, no
submodule, no prompt, and no protocol but https and file. A folder of this machine is read where it
lies, with every protocol refused. Each file is checked against its object name, which the commit
fixes.
"""

import functools
import hashlib
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from escape import without_secrets
from sharding.catalog import Git
from sharding.downloads import FetchError
from storage import check_inside, naming, partial_of

BATCH = 2000
"""Blobs of one request: an interrupted download keeps the batches that arrived."""

PIECE = 2**20
"""Bytes that are read at once."""

MOST_BYTES = 255
"""UTF-8 bytes of one part of a path, as common file systems have it."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

LINKS, NAMES, POINTERS, ABSENT = (
    "symbolic links", "unsafe names", "LFS pointers", "files that the local copy lacks",
)  # fmt: skip

_SAFE = {
    "core.hooksPath": os.devnull, "credential.helper": "", "core.askPass": "",
    "core.fsmonitor": "false", "gc.auto": "0", "maintenance.auto": "false",
    "fetch.negotiationAlgorithm": "noop", "protocol.version": "2",
}  # fmt: skip

Progress = Callable[[str, int | None], AbstractContextManager[Callable[..., None]]]


class Entry(NamedTuple):
    """One regular file of a commit."""

    path: str
    blob: str  # object name, 40 hexadecimal digits


@dataclass(frozen=True)
class Extracted:
    """The files that lie in the folder now, and how many matching ones were left out, by reason."""

    names: list[str]
    left_out: dict[str, int]


@dataclass(frozen=True)
class _Repository:
    """A Git directory of this machine, and the protocols that its commands may use."""

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

    def _explain(self, stderr: str) -> str:
        address = without_secrets(self.address)
        if re.search(
            "not our ref|unadvertised object|find remote ref|bad object|valid object", stderr
        ):
            return f"{address} has no such commit; correct `commit` in the catalog"
        lines = [line for line in stderr.splitlines() if line.startswith(("fatal:", "error:"))]
        reason = without_secrets((lines or stderr.splitlines() or ["no reason given"])[0])
        return f"no files from {address}: {reason}; run the command again to resume"


def extract(
    git: Git, folder: Path, work: Path, mirror: Path | None, progress: Progress
) -> Extracted:
    """Write the files that `git` describes below `folder`, at their paths in the repository.

    `work` is a Git directory that the download may use and a later call resumes with; `mirror` is
    searched for a local copy first (`find_mirror`). Files that lie in `folder` with the right bytes
    are kept.

    Raises:
        FetchError: no git, no network, no such commit, or other files than the catalog expects.
        OSError, ValueError: the disk, or a link that leads out of `folder`.
    """
    local = _local_folder(git.repository, mirror)
    repository = _Repository(local or work, git.repository, "none" if local else "https:file")
    if not local:
        _download_commit(repository, git.commit)
    if repository.run("cat-file", "-t", git.commit).strip() != b"commit":
        raise FetchError(
            f"{without_secrets(git.repository)}: {git.commit} is no commit; correct the catalog"
        )
    entries, left_out = _choose(
        git, repository.run("ls-tree", "-r", "-z", "--full-tree", git.commit)
    )
    for parent in {(folder / entry.path).parent for entry in entries}:
        check_inside(parent, folder)
    lacking = [entry for entry in entries if not _has_blob(folder / entry.path, entry.blob)]
    absent = _missing(repository, git.commit) & {entry.blob for entry in lacking}
    if not local:
        _download_blobs(repository, sorted(absent))
        absent = set()
    left_out[ABSENT] += sum(entry.blob in absent for entry in lacking)
    to_write = [entry for entry in lacking if entry.blob not in absent]
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
            f"{without_secrets(git.repository)} holds nothing to use: {counted(left_out)}"
        )
    return Extracted(names, {reason: n for reason, n in sorted(left_out.items()) if n})


def counted(left_out: Mapping[str, int]) -> str:
    """The counts of what was left out as a message has them."""
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)


def find_mirror(mirror: Path, repository: str) -> Path | None:
    """The Git directory of a repository below a folder of mirrors, which holds OWNER+NAME: the
    directory itself, or one of `.git`, `repo` and `repo/.git` in it. None where there is none.
    """
    parts = urlsplit(repository).path.strip("/").removesuffix(".git").split("/")
    place = mirror / "+".join(parts[-2:])
    folders = (place, place / ".git", place / "repo", place / "repo" / ".git")
    return next((each for each in folders if (each / "HEAD").is_file()), None)


def _local_folder(repository: str, mirror: Path | None) -> Path | None:
    """Where the repository lies on this machine, if it does."""
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
    """The environment of git: none of the caller's GIT variables, no prompt, English messages."""
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
    """Bring the commit and its trees, and its blobs too where the server knows no filter."""
    if not (repository.folder / "HEAD").is_file():
        repository.run("init", "--quiet", "--bare", "--template=", str(repository.folder))
    for lock in repository.folder.rglob("*.lock"):  # of a killed download: this one is alone
        lock.unlink()
    repository.run(*_FETCH, "--depth=1", "--", repository.address, commit)


def _download_blobs(repository: _Repository, blobs: Sequence[str]) -> None:
    for start in range(0, len(blobs), BATCH):
        wanted = "".join(f"{blob}\n" for blob in blobs[start : start + BATCH])
        repository.run(*_FETCH, "--stdin", "--", repository.address, text=wanted)


def _missing(repository: _Repository, commit: str) -> set[str]:
    """The objects of a commit that are not in the Git directory."""
    listed = repository.run("rev-list", "-1", "--objects", "--missing=print", commit)
    return {line[1:41].decode() for line in listed.splitlines() if line.startswith(b"?")}


# --- which files ----------------------------------------------------------------------------------


def _choose(git: Git, tree: bytes) -> tuple[list[Entry], Counter[str]]:
    """The regular files of a `ls-tree -z` that fit the catalog, and what was left out."""
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
        raise FetchError(f"{where}: no file fits {rule}; correct the catalog")
    if git.count and len(entries) != git.count:
        raise FetchError(
            f"{where}: {len(entries):,} files fit {rule}, the catalog expects {git.count:,}; "
            "correct the one or the other"
        )
    digest = manifest_sha256(entries)
    if git.manifest_sha256 and digest != git.manifest_sha256:
        raise FetchError(
            f"{where}: the files that fit {rule} have the manifest {digest[:12]}..., the catalog "
            f"says {git.manifest_sha256[:12]}...; correct the one or the other"
        )
    return entries, left_out


def manifest_sha256(entries: Sequence[Entry]) -> str:
    """The hash of the lines `<object name> <path>` of the files, sorted."""
    lines = sorted(f"{entry.blob} {entry.path}\n" for entry in entries)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_safe(path: str) -> bool:
    """Whether a path stays below its folder on every system and is no hidden file."""
    return all(
        part
        and not part.startswith(".")
        and len(part.encode()) <= MOST_BYTES
        and not re.search(r"[\x00-\x1f\x7f\\:\ufffd]", part)
        for part in path.split("/")
    )


# --- their bytes ----------------------------------------------------------------------------------


def _blob_name(size: int) -> "hashlib._Hash":
    """The hash of a blob's object name, begun with its header; Git names objects by SHA-1."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _has_blob(path: Path, blob: str) -> bool:
    """Whether a file has the bytes of a blob."""
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
    """Write each blob to its path; a file has its name when its bytes are whole."""
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
                    _write_blob(path, entry, _read_blob(process, entry, repository.address))
                advance(1)
        finally:
            process.kill()


def _read_blob(process: subprocess.Popen[bytes], entry: Entry, address: str) -> Iterator[bytes]:
    """Ask `git cat-file --batch` for a blob: its header's size as 8 bytes, then its pieces."""
    assert process.stdin and process.stdout
    process.stdin.write(f"{entry.blob}\n".encode())
    process.stdin.flush()
    header = process.stdout.readline().split()
    if len(header) != 3 or header[1] != b"blob":
        raise FetchError(
            f"{without_secrets(address)}: {entry.path} cannot be read; run the command again"
        )
    left = int(header[2])
    yield left.to_bytes(8, "big")
    while left:
        piece = process.stdout.read(min(left, PIECE))
        if not piece:
            raise FetchError(
                f"{without_secrets(address)}: {entry.path} ended early; run the command again"
            )
        left -= len(piece)
        yield piece
    process.stdout.read(1)


def _write_blob(path: Path, entry: Entry, pieces: Iterator[bytes]) -> None:
    name = _blob_name(int.from_bytes(next(pieces), "big"))
    partial = partial_of(path)
    try:
        with partial.open("wb") as stream:
            for piece in pieces:
                name.update(piece)
                stream.write(piece)
        if name.hexdigest() != entry.blob:
            raise FetchError(f"{entry.path} has other bytes than its object name says; fetch anew")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
