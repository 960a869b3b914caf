"""Atomic writing: a file is missing, old or complete, synced before its rename, with umask mode."""

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

import escape
import storage
from locks import locked
from storage import (
    atomic_folder,
    partial_of,
    publish,
    read_plain,
    read_text,
    whole_name,
    write_atomically,
    write_bytes,
    write_text,
)
from tests.builders import ROOT, can_mount, small_disk
from tests.servers import Server


@pytest.fixture
def umask() -> Iterator[None]:
    """Set a umask: the group may read and write, others nothing."""
    before = os.umask(0o007)
    yield
    os.umask(before)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record fsyncs and renames in order, by file name without the number of its writer."""
    seen: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def plain(path: str | Path) -> str:
        return re.sub(r"\.\d+\.", ".", Path(path).name)

    def noted_sync(descriptor: int) -> None:
        seen.append(("fsync", plain(str(Path(f"/proc/self/fd/{descriptor}").readlink()))))
        sync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        seen.append(("rename", plain(path)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    return seen


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def private(path: Path) -> None:
    """Write like some libraries: through another file that only its owner may read."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.write_text("new")


def test_text_and_bytes_are_written_unchanged(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "grün\n")
    write_bytes(tmp_path / "b.bin", b"\r\n\0")
    assert (tmp_path / "a.txt").read_bytes() == "grün\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\r\n\0"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("write", [lambda path: path.write_text("new"), private])
def test_file_modes_follow_the_umask(
    tmp_path: Path, umask: None, write: Callable[[Path], object]
) -> None:
    write_atomically(tmp_path / "a", write)
    assert mode_of(tmp_path / "a") == 0o660
    with atomic_folder(tmp_path / "b") as partial:
        write(partial / "c")
    assert mode_of(tmp_path / "b/c") == 0o660
    assert mode_of(tmp_path / "b") == 0o770


def test_a_file_is_synced_before_it_is_renamed(
    tmp_path: Path, order: list[tuple[str, str]]
) -> None:
    write_text(tmp_path / "a", "new")
    assert order == [("fsync", "a.partial"), ("rename", "a.partial"), ("fsync", tmp_path.name)]


def test_a_folder_is_synced_before_it_is_renamed(
    tmp_path: Path, order: list[tuple[str, str]]
) -> None:
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "inner").mkdir()
        (partial / "inner/b").write_text("new")
    assert order == [
        *(("fsync", name) for name in ("b", "inner", "a.partial")),
        ("rename", "a.partial"), ("fsync", tmp_path.name),
    ]  # fmt: skip


def failing(path: Path) -> None:
    path.write_text("half")
    raise OSError("disk full")


def test_an_error_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for name in ("a", "b"):
        with pytest.raises(OSError, match="disk full"):
            write_atomically(tmp_path / name, failing)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_an_error_keeps_the_old_folder_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_text("old")
    with (
        pytest.raises(OSError, match="disk full"),
        atomic_folder(tmp_path / "a", replace=True) as partial,
    ):
        failing(partial / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]
    assert (tmp_path / "a/b").read_text() == "old"


def test_a_folder_is_replaced_only_with_replace(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/old").write_text("old")
    with pytest.raises(OSError), atomic_folder(tmp_path / "a") as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]
    with atomic_folder(tmp_path / "a", replace=True) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]


@pytest.mark.parametrize(
    ("name", "file", "folder"),
    [("a.7.partial", "a", "a"), ("a.old.7.partial", "a.old", "a"), ("\n.7.partial", "\n", "\n"),
     ("a.1.partial.7.partial", "a.1.partial", "a.1.partial"), ("a.partial", None, None),
     (".7.partial", None, None), ("a.x7.partial", None, None), ("a.7.partial.b", None, None)],
)  # fmt: skip
def test_the_final_name_is_read_from_a_temporary_one(
    name: str, file: str | None, folder: str | None
) -> None:
    assert (whole_name(name), whole_name(name, is_folder=True)) == (file, folder)


def test_a_temporary_path_has_its_final_name(tmp_path: Path) -> None:
    assert whole_name(partial_of(tmp_path / "a.tar").name) == "a.tar"


def test_writers_of_one_file_have_different_temporary_files(tmp_path: Path) -> None:
    """Threads of one process, and containers, whose first process has the id 1."""
    together = threading.Barrier(2)

    def write(partial: Path) -> None:
        partial.write_text("whole")
        together.wait()

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(write_atomically, tmp_path / "a", write) for _ in range(2)]:
            done.result()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_a_temporary_folder_is_left_alone_before_its_writer_has_come_to_use_it(
    tmp_path: Path,
) -> None:
    """Two that start in the same millisecond must not remove the folder of each other."""
    with locked(tmp_path / ".a.lock"):  # as a writer that has just begun
        (tmp_path / "a.12345.partial").mkdir()
        with pytest.raises(BlockingIOError), atomic_folder(tmp_path / "a"):
            pass
        assert (tmp_path / "a.12345.partial").exists()


def test_a_temporary_name_of_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("a" * storage.MAX_NAME_BYTES), b"")


def test_temporary_folders_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a.12345.partial").mkdir()
    (tmp_path / "a.old.12345.partial").mkdir()
    others = ["a.b.12345.partial", "a.partial", "ab.12345.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "b").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", *others]


def test_a_folder_that_another_process_is_writing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.old.12345.partial").mkdir()
    with atomic_folder(tmp_path / "a") as partial:
        (partial / "b").write_text("first")
        (tmp_path / "a.old.12345.partial").mkdir()  # its second writer must not touch anything
        with (
            pytest.raises(BlockingIOError, match=r"another process is writing .*a; wait for it"),
            atomic_folder(tmp_path / "a"),
        ):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.old.12345.partial"]
    assert (tmp_path / "a/b").read_text() == "first"


def test_an_old_folder_without_its_successor_gets_its_name_back(tmp_path: Path) -> None:
    (tmp_path / "a.old.12345.partial").mkdir()
    (tmp_path / "a.old.12345.partial/b").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "a") as partial:
        failing(partial / "b")
    assert (tmp_path / "a/b").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_replaced_is_never_partial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename and removal it is complete, old or new, or missing."""
    seen = []
    removes = shutil.rmtree

    def watched(path: Path, **options: bool) -> None:
        seen.append({p.name: sorted(f.name for f in p.iterdir()) for p in tmp_path.glob("a")})
        removes(path, **options)

    (tmp_path / "a").mkdir()
    for number in range(20):
        (tmp_path / "a" / f"{number}").write_text("old")
    monkeypatch.setattr(shutil, "rmtree", watched)
    with atomic_folder(tmp_path / "a", replace=True) as partial:
        (partial / "new").write_text("new")
    assert {"a": ["new"]} in seen
    assert all(len(files.get("a", [])) in (0, 1, 20) for files in seen)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "new"]


def test_publish_syncs_then_renames_a_file(tmp_path: Path, order: list[tuple[str, str]]) -> None:
    (tmp_path / "a.partial").write_text("new")
    publish(tmp_path / "a.partial", tmp_path / "a")
    assert order == [("fsync", "a.partial"), ("rename", "a.partial"), ("fsync", tmp_path.name)]


def test_an_object_is_uploaded_only_when_complete() -> None:
    path = UPath("memory://bucket/a.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, failing)
    assert not path.exists()
    write_text(path, "new")
    assert path.read_text() == "new"


def test_an_upload_error_of_a_client_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    path = UPath("memory://bucket/b.txt")

    def refused(*_arguments: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(type(path.fs), "put_file", refused)
    with pytest.raises(OSError, match=r"bucket/b\.txt could not be written: Unable to locate"):
        write_text(path, "new")


def test_an_fsync_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_descriptor: int) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match=r"Input/output error: .*a'$"):
        write_text(tmp_path / "a", "new")
    assert not list(tmp_path.iterdir())


def too_much_text(path: Path) -> None:
    path.write_text("x" * 200_000)


def too_large_table(path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([str(i) * 9 for i in range(90_000)])}), path)


@pytest.mark.parametrize("write", [too_much_text, too_large_table])
def test_a_too_large_file_is_named_in_the_error(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    (tmp_path / "a").write_text("old")
    with small_disk(100_000), pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a", write)
    assert str(caught.value) == f"[Errno 27] File too large: '{tmp_path / 'a'}'"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


FULL_DISK = """
import sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from storage import write_atomically

table = pa.table({"x": pa.array([str(i) * 9 for i in range(90_000)])})
for name, write in (
    ("text", lambda partial: partial.write_text("x" * 200_000)),
    ("table", lambda partial: pq.write_table(table, partial)),
):
    try:
        write_atomically(Path(sys.argv[1]) / name, write)
    except OSError as error:
        print(error)
"""


@pytest.mark.parametrize("name", ["none/file", "folder"])
def test_an_error_about_the_temporary_file_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / name, "")
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.skipif(not can_mount(), reason="mounting a small file system needs root")
def test_a_full_disk_error_names_the_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=80k none {disk} || exit 99\n"
        f"{sys.executable} -c '{FULL_DISK}' {disk}; ls {disk} | wc -l"
    )
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = [f"[Errno 28] No space left on device: '{disk}/{name}'" for name in ("text", "table")]
    assert result.stdout.splitlines() == [*said, "0"], result.stderr


def test_an_address_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/sets"
    with pytest.raises(OSError, match=rf"^{address} does not answer: Cannot connect .* network$"):
        storage.check_reachable(UPath(address))
    path = UPath("memory://bucket/none")
    storage.check_reachable(path)

    def refused(*_arguments: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(type(path.fs), "exists", lambda *_arguments: False)
    monkeypatch.setattr(type(path.fs), "info", refused)
    with pytest.raises(OSError, match="bucket/none does not answer: no route"):
        storage.check_reachable(path)


@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_a_server_that_answers_is_reachable_whatever_it_says(status: int) -> None:
    with Server() as server:
        server.bodies["/sets"] = b"listing"
        server.status["/sets"] = status
        storage.check_reachable(UPath(f"{server.url}/sets"))
        assert server.asked
        server.shutdown()


def test_only_plain_files_within_the_limit_are_read(tmp_path: Path) -> None:
    """A pipe would be waited for, and a device read without an end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(storage.RefusedFileError, match="not a plain file, but a pipe, a dev"):
            read_plain(tmp_path / name)
        with pytest.raises(storage.RefusedFileError, match="not a plain file, but a pipe, a dev"):
            storage.sha256_of(tmp_path / name)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(IsADirectoryError) as refused:
            read_plain(tmp_path)
        assert escape.one_line(refused.value) == f"{tmp_path}: Is a directory"
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    remote = UPath("memory://bucket/plain.json")
    for path in (tmp_path / "a.json", remote):
        path.write_bytes("é\n".encode())
        assert read_text(path, 3) == "é\n"
        with pytest.raises(storage.RefusedFileError, match="3 bytes, more than the limit of 2"):
            read_plain(path, 2)
    remote.unlink()
    (tmp_path / "empty").touch()
    assert read_plain(str(tmp_path / "empty")) == b""
    assert read_plain("/proc/self/status").startswith(b"Name:")  # says that it has 0 bytes
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(storage.RefusedFileError, match=f"more than the limit of {2**28:,}"):
        read_plain(tmp_path / "sparse")


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_deeply_nested_json_is_a_value_error(deep: str) -> None:
    with pytest.raises(ValueError, match="it is nested too deeply"):
        storage.parse_json(deep)
    assert storage.parse_json(b'{"a": [1]}') == {"a": [1]}


@pytest.mark.parametrize("digits", [301, 10_000])
def test_whole_numbers_that_no_float_can_hold_are_a_value_error(digits: int) -> None:
    with pytest.raises(ValueError, match="a number in it has more than 300 digits"):
        storage.parse_json(f'{{"a": {"9" * digits}}}')
    assert storage.parse_json("9" * 300) == 10**300 - 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"{\n oops", "Expecting property name enclosed in double quotes in line 2, column 2"),
        (b"\xff{}", "byte 0 is 0xff, which is not UTF-8"),
    ],
)
def test_text_fault_names_the_byte_or_the_place(data: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        json.loads(data.decode("utf-8"))
    assert escape.text_fault(caught.value) == said


def test_only_old_temporary_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def sticky(path: Path) -> None:  # as in /tmp, if the file is of another user
        if path.name.startswith("theirs"):
            raise PermissionError
        unlink(path)

    monkeypatch.setattr(Path, "unlink", sticky)
    theirs = [f"theirs{number}.1.partial" for number in range(9)]
    for name in theirs:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for name in ("a.arrow.17.partial", "b.arrow.18.partial", "c.partial", "d.arrow"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("a.arrow.17.partial", "c.partial", "d.arrow"):
        os.utime(tmp_path / name, (1, 1))
    storage.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "b.arrow.18.partial", "c.partial", "d.arrow", *theirs,
    ]  # fmt: skip
