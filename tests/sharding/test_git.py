"""Tests of sources of the kind `git`, with repositories that each test creates."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharding.catalog import Source
from sharding.fetch import MARK, Fetched, fetch_source
from sharding.fetch_spec import BEGUN, Fetch, Git
from sharding.git import LFS_POINTER, extract, find_mirror
from tests.builders import ROOT

IMAGES = {f"art/{n}.png": bytes([n]) * 3000 for n in range(6)}
FILES = {**IMAGES, "art/notes.txt": b"no image", "code/run.py": b"print(1)", "code/7.png": b"x"}


def git(folder: Path, *words: str, data: bytes = b"") -> str:
    who = {
        f"GIT_{role}_{what}": "a@b"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    command = ["git", "--git-dir", str(folder), *words]
    done = subprocess.run(
        command, input=data, capture_output=True, check=True, env=os.environ | who
    )
    return done.stdout.decode().strip()


def blob_of(folder: Path, data: bytes) -> str:
    return git(folder, "hash-object", "-w", "--stdin", data=data)


def tree_of(folder: Path, entries: list[tuple[str, bytes, str]]) -> str:
    """Write a tree of (mode, name, object) without a check of the names; return its object."""
    body = b"".join(
        f"{mode} ".encode() + name + b"\0" + bytes.fromhex(object_name)
        for mode, name, object_name in entries
    )
    return git(folder, "hash-object", "-w", "-t", "tree", "--literally", "--stdin", data=body)


def commit_of(folder: Path, tree: str) -> str:
    commit = git(folder, "commit-tree", tree, "-m", "x")
    git(folder, "update-ref", "refs/heads/main", commit)
    git(folder, "symbolic-ref", "HEAD", "refs/heads/main")
    return commit


def make(folder: Path, files: dict[str, bytes] = FILES, filters: bool = True) -> str:
    """Create a repository with these files, each in one folder; return its commit."""
    subprocess.run(["git", "init", "--quiet", "--bare", str(folder)], check=True)
    git(folder, "config", "uploadpack.allowFilter", str(filters).lower())
    tops: dict[str, list[tuple[str, bytes, str]]] = {}
    for name, data in sorted(files.items()):
        top, _, base = name.partition("/")
        tops.setdefault(top, []).append(("100644", base.encode(), blob_of(folder, data)))
    trees = [("40000", top.encode(), tree_of(folder, entries)) for top, entries in tops.items()]
    return commit_of(folder, tree_of(folder, trees))


def source(repository: Path | str, commit: str, **more: object) -> Source:
    address = repository if isinstance(repository, str) else f"file://{repository}"
    values = {"below": "art/", "pattern": r"\.png$", **more}
    fetch = Fetch(git=Git(repository=address, commit=commit, **values))
    return Source(license="x", set="train", real=["**"], fetch=fetch)


def files_of(folder: Path) -> dict[str, bytes]:
    inside = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in inside.items() if not name.startswith(".")}


@pytest.mark.parametrize("filters", [True, False])
def test_the_matching_files_of_one_commit_are_extracted(tmp_path: Path, filters: bool) -> None:
    commit = make(tmp_path / "r", filters=filters)
    make_later = tree_of(tmp_path / "r", [("100644", b"9.png", blob_of(tmp_path / "r", b"later"))])
    commit_of(tmp_path / "r", make_later)
    s = source(tmp_path / "r", commit, count=6)
    raw = tmp_path / "raw"
    assert fetch_source("s", s, raw) == Fetched("s", "downloaded", f"{raw / 's'} (6 files)")
    assert files_of(raw / "s") == IMAGES
    mark = json.loads((raw / "s" / MARK).read_text())
    assert mark["files"] == dict.fromkeys(IMAGES, 3000)
    assert mark["fetch"]["git"]["commit"] == commit
    assert not (raw / "s" / BEGUN).exists()
    assert not (raw / ".s.git").exists()
    (raw / "s" / BEGUN).write_text("{}")  # of another download that was interrupted
    assert fetch_source("s", s, raw).status == "downloaded" and not (raw / "s" / BEGUN).exists()
    (tmp_path / "r").rename(tmp_path / "gone")
    assert fetch_source("s", s, raw).status == "complete"


def test_only_the_needed_blobs_are_downloaded(tmp_path: Path) -> None:
    commit = make(tmp_path / "r")
    fetch = source(tmp_path / "r", commit).fetch
    assert fetch and fetch.git
    (tmp_path / "to").mkdir()
    from sharding.fetch import _no_progress

    extract(fetch.git, tmp_path / "to", tmp_path / "work", None, _no_progress)
    listed = git(
        tmp_path / "work", "cat-file", "--batch-check", "--batch-all-objects", "--unordered"
    )
    blobs = {line.split()[0] for line in listed.splitlines() if line.split()[1] == "blob"}
    assert blobs == {blob_of(tmp_path / "r", data) for data in IMAGES.values()}


def test_hostile_paths_and_links_are_left_out_and_counted(tmp_path: Path) -> None:
    repository = tmp_path / "r"
    make(repository)
    png = blob_of(repository, b"image")
    names = [
        b"..",
        b".git",
        b".hidden",
        b"a\\b.png",
        b"c:d.png",
        b"bell\x07.png",
        b"\xff.png",
        b"n" * 256,
    ]
    folder = [("100644", b"x.png", png)]
    entries = [("40000" if name[0:1] in b".n" else "100644", name, "") for name in names]
    inner = tree_of(repository, folder)
    entries = [(mode, name, inner if mode == "40000" else png) for mode, name, _ in entries]
    link = blob_of(repository, b"/etc/passwd")
    entries += [("100644", b"good.png", png), ("120000", b"link.png", link)]
    entries += [("160000", b"module.png", "1" * 40)]
    commit = commit_of(repository, tree_of(repository, sorted(entries, key=lambda e: e[1])))
    result = fetch_source("s", source(repository, commit, below=""), tmp_path / "raw")
    assert result.note.endswith("(1 files; left out: 1 symbolic links, 8 unsafe names)"), result
    assert files_of(tmp_path / "raw" / "s") == {"good.png": b"image"}
    assert not list(tmp_path.rglob("x.png"))


def test_a_link_out_of_the_folder_is_not_written_through(tmp_path: Path) -> None:
    commit = make(tmp_path / "r")
    (tmp_path / "outside").mkdir()
    (tmp_path / "raw/s").mkdir(parents=True)
    (tmp_path / "raw/s/art").symlink_to(tmp_path / "outside")
    result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
    assert result.status == "failed"
    assert "is outside of" in result.note
    assert not list((tmp_path / "outside").iterdir())


def test_a_wrong_commit_is_a_one_line_error(tmp_path: Path) -> None:
    make(tmp_path / "r")
    for commit in ("0" * 39 + "1", blob_of(tmp_path / "r", IMAGES["art/1.png"])):
        result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
        assert result.status == "failed"
        assert "correct" in result.note and "commit" in result.note, result.note
        assert "\n" not in result.note
    result = fetch_source("s", source(tmp_path / "none", "1" * 40), tmp_path / "raw")
    assert "download from file://" in result.note and "run the command again" in result.note


def test_a_local_copy_without_the_commit_is_a_one_line_error(tmp_path: Path) -> None:
    make(tmp_path / "r")
    result = fetch_source("s", source(str(tmp_path / "r"), "1" * 40), tmp_path / "raw")
    assert "has no such commit; correct `commit` in the catalog" in result.note


def test_files_of_an_earlier_commit_are_removed(tmp_path: Path) -> None:
    """A build would pack them. Files that this command did not write, or not so, are kept."""
    repository, target = tmp_path / "r", tmp_path / "raw/s"
    first = make(repository)
    assert fetch_source("s", source(repository, first), tmp_path / "raw").status == "downloaded"
    (target / "art/own.png").write_bytes(b"mine")
    (target / "art" / f".{'1' * 40}.4711.partial").write_bytes(b"of a killed fetch")
    (target / "art/.own.4711.partial").write_bytes(b"mine, too")
    _gone, changed, *kept = sorted(IMAGES)
    (target / changed).write_bytes(b"changed")
    entries = [("100644", name[4:].encode(), blob_of(repository, IMAGES[name])) for name in kept]
    art = tree_of(repository, entries)
    later = commit_of(repository, tree_of(repository, [("40000", b"art", art)]))
    assert fetch_source("s", source(repository, later), tmp_path / "raw").status == "downloaded"
    assert files_of(target).keys() == {changed, "art/own.png", "art/.own.4711.partial", *kept}
    assert json.loads((target / MARK).read_text())["files"].keys() == set(kept)


def test_other_files_than_the_catalog_expects_are_refused(tmp_path: Path) -> None:
    commit = make(tmp_path / "r")
    lines = sorted(f"{blob_of(tmp_path / 'r', data)} {name}\n" for name, data in IMAGES.items())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    cases = {
        "6 files match below = 'art/'": {"count": 7},
        f"have manifest_sha256 {digest[:12]}": {"manifest_sha256": "0" * 64},
        "no file matches below = 'other/'": {"below": "other/"},
    }
    for words, more in cases.items():
        result = fetch_source("s", source(tmp_path / "r", commit, **more), tmp_path / "raw")
        assert result.status == "failed"
        assert words in result.note
        assert files_of(tmp_path / "raw/s") == {}
    s = source(tmp_path / "r", commit, count=6, manifest_sha256=digest)
    assert fetch_source("s", s, tmp_path / "raw").status == "downloaded"


PROGRAM = """
import contextlib, sys, time
from pathlib import Path
from sharding.catalog import Source
from sharding.fetch import fetch_source
from sharding.fetch_spec import Fetch, Git
raw, repository, commit = sys.argv[1:]
@contextlib.contextmanager
def slow(_label, _total):
    done = []
    def advance(count=1):
        done.append(count)
        if len(done) == 4:
            print("stalled", flush=True)
            time.sleep(60)
    yield advance
git = Git(repository=repository, commit=commit, below="art/", pattern=r"\\.png$")
fetch_source("s", Source(license="x", set="t", real=["**"], fetch=Fetch(git=git)), Path(raw), slow)
"""


def killed_fetch(tmp_path: Path, commit: str) -> dict[Path, int]:
    """Kill a fetch of `IMAGES` before its end; return its files with their times."""
    raw = tmp_path / "raw"
    command = [sys.executable, "-c", PROGRAM, str(raw), f"file://{tmp_path / 'r'}", commit]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"stalled\n"
        process.send_signal(signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in (raw / "s/art").iterdir()}
    assert 0 < len(first) < len(IMAGES)
    assert (raw / "s" / BEGUN).exists() and not (raw / "s" / MARK).exists()
    return first


def test_a_killed_fetch_resumes_with_its_files(tmp_path: Path) -> None:
    commit, raw = make(tmp_path / "r"), tmp_path / "raw"
    first = killed_fetch(tmp_path, commit)
    damaged = min(first)
    damaged.write_bytes(b"cut")
    (raw / ".s.git" / "shallow.lock").touch()  # git leaves it when killed
    result = fetch_source("s", source(tmp_path / "r", commit), raw)
    assert result.status == "downloaded", result.note
    assert files_of(raw / "s") == IMAGES
    kept = {path for path, stamp in first.items() if path.stat().st_mtime_ns == stamp}
    assert kept == first.keys() - {damaged}


def test_files_of_a_killed_fetch_that_its_rule_no_longer_names_are_removed(tmp_path: Path) -> None:
    """A build would pack them."""
    commit, raw = make(tmp_path / "r"), tmp_path / "raw"
    first = killed_fetch(tmp_path, commit)
    last = max(IMAGES)
    assert raw / "s" / last not in first
    (raw / "s/art/own.png").write_bytes(b"mine")
    result = fetch_source("s", source(tmp_path / "r", commit, pattern=last), raw)
    assert result.status == "downloaded", result.note
    assert files_of(raw / "s").keys() == {last, "art/own.png"}


def test_without_git_the_error_says_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = make(tmp_path / "r")
    monkeypatch.setenv("PATH", str(tmp_path))
    result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
    assert result.status == "failed"
    assert "need the git command; install git" in result.note


def test_lfs_pointers_are_left_out(tmp_path: Path) -> None:
    pointer = LFS_POINTER + b"v1\noid sha256:00\nsize 9\n"
    commit = make(tmp_path / "r", {**IMAGES, "art/big.png": pointer})
    result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
    assert result.note.endswith("(6 files; left out: 1 LFS pointers)")
    assert files_of(tmp_path / "raw/s") == IMAGES


@pytest.mark.parametrize("inside", ["", ".git", "repo", "repo/.git"])
def test_a_mirror_is_read_instead_of_the_network(tmp_path: Path, inside: str) -> None:
    mirror = tmp_path / "mirror"
    place = mirror / "owner+name" / inside
    place.parent.mkdir(parents=True, exist_ok=True)
    commit = make(place)
    address = "https://nowhere.invalid/owner/name.git"
    assert find_mirror(mirror, address) == place
    result = fetch_source("s", source(address, commit), tmp_path / "raw", git_mirror=mirror)
    assert result.status == "downloaded", result.note
    assert files_of(tmp_path / "raw/s") == IMAGES


def test_files_that_a_mirror_lacks_are_fetched_once_they_are_there(tmp_path: Path) -> None:
    mirror, raw = tmp_path / "mirror", tmp_path / "raw"
    repository = mirror / "owner+name"
    mirror.mkdir()
    commit = make(repository)
    blob = blob_of(repository, IMAGES["art/3.png"])
    (repository / "objects" / blob[:2] / blob[2:]).unlink()
    s = source("https://nowhere.invalid/owner/name", commit)
    result = fetch_source("s", s, raw, git_mirror=mirror)
    assert result.note.endswith("left out: 1 files that the local copy lacks)")
    assert fetch_source("s", s, raw).status == "failed"  # it asks the address, which is not there
    blob_of(repository, IMAGES["art/3.png"])
    assert fetch_source("s", s, raw, git_mirror=mirror).status == "downloaded"
    assert files_of(raw / "s") == IMAGES
    assert fetch_source("s", s, raw).status == "complete"


def test_a_mirror_without_the_commit_is_named(tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    make(mirror / "owner+name")
    s = source("https://nowhere.invalid/owner/name", "1" * 40)
    note = fetch_source("s", s, tmp_path / "raw", git_mirror=mirror).note
    assert note.startswith(f"the copy at {mirror}/owner+name lacks the commit of the catalog; upd")
    assert note.endswith("update it, or leave out --git-mirror")


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    name = "n" * 251 + ".png"
    commit = make(tmp_path / "r", {f"art/{name}": b"image"})
    result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
    assert result.status == "downloaded", result.note
    assert files_of(tmp_path / "raw/s") == {f"art/{name}": b"image"}


def test_nothing_of_a_repository_is_executed(tmp_path: Path) -> None:
    """A local copy may configure hooks, and commands that fetch a missing blob."""
    repository, trap = tmp_path / "r", tmp_path / "trap"
    commit = make(repository)
    blob = blob_of(repository, IMAGES["art/3.png"])
    (repository / "objects" / blob[:2] / blob[2:]).unlink()
    script = tmp_path / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {trap}\n")
    script.chmod(0o755)
    for key, value in {
        "core.repositoryFormatVersion": "1", "extensions.partialClone": "origin",
        "remote.origin.promisor": "true", "remote.origin.url": f"ext::{script}",
        "remote.origin.uploadpack": str(script), "core.fsmonitor": str(script),
        "core.sshCommand": str(script), "protocol.ext.allow": "always",
        "filter.lfs.smudge": str(script), "core.hooksPath": str(tmp_path),
    }.items():  # fmt: skip
        git(repository, "config", key, value)
    result = fetch_source("s", source(str(repository), commit), tmp_path / "raw")
    assert result.note.endswith("(5 files; left out: 1 files that the local copy lacks)")
    assert not trap.exists()


def test_the_callers_git_variables_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = make(tmp_path / "r")
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_NAMESPACE", "x")
    result = fetch_source("s", source(tmp_path / "r", commit), tmp_path / "raw")
    assert result.status == "downloaded", result.note


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"repository": "https://me:secret@host/a/b"}, "without a login"),
        ({"repository": "ext::sh -c true"}, "expected https"),
        ({"repository": "http://host/a/b"}, "expected https"),
        ({"repository": "--upload-pack=x"}, "expected https"),
        ({"commit": "main"}, "40 hexadecimal digits"),
        ({"pattern": "("}, "not a regular expression"),
        ({"manifest_sha256": "12"}, "64 hexadecimal digits"),
    ],
)
def test_invalid_git_entries_are_refused(values: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Git(**{"repository": "https://host/a/b", "commit": "1" * 40, **values})
