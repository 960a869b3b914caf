"""Input files of a run: a watched folder, and a list without an end."""

import glob
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imaging.decode import DecodeError
from model import load_detector
from model.inference import inputs
from tests.builders import encode, photo, write_tar, write_zip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_a_pattern_does_not_follow_links_to_folders(tmp_path: Path) -> None:
    """A folder that links to itself would give each image many times."""
    (tmp_path / "a/b").mkdir(parents=True)
    for name in ("a/1.jpg", "a/b/2.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "a/link.jpg").symlink_to("1.jpg")
    (tmp_path / "top").symlink_to("a")  # named in the pattern, so it is followed
    for pattern in ("a/**/*.jpg", "**/*.jpg", "top/**/*.jpg", "to*/**/*.jpg"):
        excluded: Counter[str] = Counter()
        files = inputs.find_images([f"{tmp_path}/{pattern}"], excluded)
        names = sorted(Path(file.name).name for file in files)
        assert names == ["1.jpg", "2.jpg", "link.jpg"], pattern
        assert excluded["a link to a folder"] == (2 if pattern.startswith("*") else 1), pattern


def test_an_index_or_a_listed_tar_that_is_a_pipe_or_a_device_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, target in (("pipe", ""), ("device", "/dev/zero"), ("tar", "")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.png").touch()
        index = folder / ("a.tar" if name == "tar" else "index.json")
        index.symlink_to(target) if target else os.mkfifo(index)
        if name == "tar":
            (folder / "index.json").touch()
            monkeypatch.setattr(inputs, "_shards_of", lambda _: frozenset({"a.tar"}))
        files = {Path(f.name).name: f for f in inputs.find_images([str(folder)], Counter())}
        assert files.keys() == ({"a.tar", "x.png"} if name == "tar" else {"x.png"})
    with pytest.raises(DecodeError, match=r"^not a plain file, but a pipe"):
        files["a.tar"].read()


def write_table(path: Path, columns: dict[str, object], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_the_images_of_a_parquet_table_are_read_by_row(tmp_path: Path) -> None:
    data = [encode(photo(number, 20, 20)) for number in range(7)]
    cells: list[dict | None] = [{"bytes": each, "path": f"{n}.jpg"} for n, each in enumerate(data)]
    cells[2], cells[4] = {"bytes": None, "path": "elsewhere.jpg"}, None
    columns = {"image": cells, "label": [0, 1] * 3 + [0], "mask": [{"bytes": b"m"}] * 7}
    path = write_table(tmp_path / "t.parquet", columns, row_group_size=3)
    excluded: Counter[str] = Counter()
    files = {}
    for file in inputs.find_images([str(path)], excluded):
        try:
            files[file.name.removeprefix(f"{path}:")] = file.read()
        except DecodeError as error:
            files[file.name.removeprefix(f"{path}:")] = str(error)
    assert [*files] == [f"{row}:{column}" for row in range(7) for column in ("image", "mask")]
    for row, each in enumerate(data):
        assert files[f"{row}:image"] == (each if row not in (2, 4) else "the cell holds no image")
    assert files["6:mask"] == b"m" and not excluded
    assert not [*inputs.find_images([str(tmp_path)], excluded)]
    assert excluded == {"a parquet table (name it to read its images)": 1}
    assert len([*inputs.find_images([f"{tmp_path}/*.parquet"], excluded)]) == 14


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"PAR1 nothing"), "not a parquet table, or damaged"),
        (lambda path: write_table(path, {"url": ["a"], "label": [1]}), r"\(columns: url, label\)$"),
        (lambda path: os.truncate(path, 40), "not a parquet table, or damaged"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"\xff\xd8", b"\0\0" * 9)),
            "not a parquet table, or damaged|is damaged",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    image = {"bytes": encode(photo(1, 20, 20))}
    path = write_table(tmp_path / "t.parquet", {"image": [image] * 3}, compression="none")
    spoil(path)
    *_, file = inputs.find_images([str(path)], Counter())
    assert file.name == str(path)
    with pytest.raises(DecodeError, match=said):
        file.read()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clock that only sleeping moves: looks at a folder follow each other at once."""
    now = [1000.0]
    monkeypatch.setattr(inputs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(inputs.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


@pytest.mark.usefixtures("clock")
def test_a_watched_folder_yields_each_complete_file_once(tmp_path: Path) -> None:
    (tmp_path / "old.jpg").write_bytes(b"12")
    os.utime(tmp_path / "old.jpg", (1, 1))
    looks = inputs.watch(str(tmp_path), Counter())

    def look() -> list[str]:
        return [Path(file.name).name for file in next(looks).files]

    assert look() == ["old.jpg"]
    growing = tmp_path / "growing.jpg"
    for size in range(4):
        growing.write_bytes(bytes(size + 1))
        os.utime(growing, (1, 1 + size))
        assert look() == []
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "half.jpg.part").write_bytes(b"x")
    assert look() == []
    assert look() == ["growing.jpg"]
    assert [look() for _ in range(4)] == [[]] * 4
    growing.unlink()
    assert look() == []
    growing.write_bytes(b"another")
    assert [name for _ in range(5) for name in look()] == ["growing.jpg"]


def test_scans_of_a_large_folder_are_further_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, slept = count(0, 0.25), []  # each scan takes 0.25 s of the processor
    monkeypatch.setattr(inputs.time, "thread_time", lambda: next(work))
    monkeypatch.setattr(inputs.time, "sleep", slept.append)
    looks = inputs.watch(str(tmp_path), Counter())
    assert [next(looks).files for _ in range(3)] == [[]] * 3
    assert slept == pytest.approx([2.25] * 2)


@pytest.mark.usefixtures("clock")
def test_a_file_that_is_put_back_beside_a_folder_that_always_fails_is_yielded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a folder of another user, or the tar of a shard set."""
    (tmp_path / "closed").mkdir()
    for name in ("a.jpg", "b.jpg", "set.tar"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, (1, 1))
    closed = inputs.unreadable(str(tmp_path / "closed"), "Permission denied")
    member = inputs.unreadable(str(tmp_path / "set.tar/a.jpg"), "not of a file of its own")

    def entries(_folder: str) -> Iterator[object]:
        images = (entry for entry in os.scandir(tmp_path) if entry.name.endswith(".jpg"))
        return iter([*images, closed, member])

    monkeypatch.setattr(inputs, "_entries", entries)
    looks = inputs.watch(str(tmp_path), Counter())
    assert len(next(looks).files) == 2
    (tmp_path / "a.jpg").rename(tmp_path / "away")
    assert next(looks).files == []
    (tmp_path / "away").rename(tmp_path / "a.jpg")
    again = [Path(file.name).name for _ in range(4) for file in next(looks).files]
    assert [name for name in again if name != "closed"] == ["a.jpg"]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("fault", ["gone", "empty", "not listed", "cut short"])
def test_images_of_a_folder_that_drops_out_are_not_yielded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Such as a network share: its folder is missing, an empty mount point, or fails."""
    share, away = tmp_path / "share", tmp_path / "away"
    share.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (share / name).write_bytes(b"12")
        os.utime(share / name, (1, 1))
    looks = inputs.watch(str(share), Counter())
    assert len(next(looks).files) == 2
    with monkeypatch.context() as patch:
        if fault in ("gone", "empty"):
            share.rename(away)
        if fault == "empty":
            share.mkdir()
        if fault in ("not listed", "cut short"):
            listed = [entry for entry in os.scandir(share) if entry.name == "a.jpg"]
            failed = inputs.unreadable(str(share), "Input/output error")
            found = [*(listed if fault == "cut short" else []), failed]
            patch.setattr(inputs, "_entries", lambda _folder: iter(found))
        assert next(looks).files == []
    if away.exists():
        away.rename(share)
    assert [next(looks).files for _ in range(4)] == [[]] * 4


@pytest.mark.usefixtures("clock")
def test_a_look_says_up_to_when_all_changes_are_in_it(tmp_path: Path) -> None:
    """A file that is not complete yet counts with its change time, also if its own time is old."""
    looks = inputs.watch(str(tmp_path), Counter())
    assert next(looks).files == []
    (tmp_path / "a.jpg").write_bytes(b"12")
    os.utime(tmp_path / "a.jpg", (1, 1))
    changed = (tmp_path / "a.jpg").stat().st_ctime
    assert [(look.files, look.until <= changed) for look in islice(looks, 2)] == [([], True)] * 2
    ready = next(looks)
    assert len(ready.files) == 1 and ready.until > changed
    assert next(looks).until >= ready.until


@pytest.mark.parametrize(
    ("pattern", "folder"),
    [("/**", "/"), ("/**/**", "/"), ("**", "."), ("a/**", "a"), ("/a/**/**", "/a"),
     ("**/a", "**/a"), ("/**/*.jpg", "/**/*.jpg"), ("a**", "a**")],
)  # fmt: skip
def test_a_last_double_star_stands_for_its_folder(pattern: str, folder: str) -> None:
    assert inputs._without_last_stars(pattern) == folder


def test_a_match_is_not_compared_with_all_folders_that_matched_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a pattern grew with the square of the number of folders."""
    compared = [0]  # by C code, which no trace sees

    class Match(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def startswith(self, prefix: str | tuple[str, ...], *rest: int) -> bool:
            compared[0] += 1 if isinstance(prefix, str) else len(prefix)
            return super().startswith(prefix, *rest)

        def __eq__(self, other: object) -> bool:
            compared[0] += 1
            return super().__eq__(other)

    matches = glob.iglob
    monkeypatch.setattr(glob, "iglob", lambda *args, **named: map(Match, matches(*args, **named)))

    def steps_per_folder(folders: int) -> float:
        """Return the number of comparisons, and of operations of `inputs.py` itself."""
        top = tmp_path / str(folders)
        for number in range(folders):
            (top / f"{number}/in").mkdir(parents=True)
        (top / "7/in/a.jpg").touch()
        operations = [0]

        def count(frame: FrameType, event: str, _value: object) -> Callable[..., Any] | None:
            if frame.f_code.co_filename != inputs.__file__:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            operations[0] += event == "opcode"
            return count

        compared[0] = 0
        before = sys.gettrace()
        sys.settrace(count)
        try:
            files = list(inputs.find_images([f"{top}/**/[0-9i]*"], Counter()))
        finally:
            sys.settrace(before)
        assert [file.name for file in files] == [f"{top}/7/in/a.jpg"]
        return (operations[0] + compared[0]) / folders

    few, many = steps_per_folder(20), steps_per_folder(200)
    assert many < 1.5 * few, (few, many)


def test_what_a_path_or_pattern_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("maps", "photos/a", "odd[1]"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "maps/old.png").touch()
    covered = {
        "*.jpg": False, "photos/*.jpg": False, "photos/*/*.jpg": False, "*/*.jpg": False,
        "photos": False, "none.jpg": False, "*": True, "m*": True, "**": True, "**/*.jpg": True,
        "m*/**/*.png": True, "p*/**": False, "photos/**": False, "maps/*.png": True, "maps": True,
        ".": True, str(tmp_path): True, f"{tmp_path}/[lm]aps": True, f"{tmp_path.parent}/*": True,
        f"{tmp_path}/*.jpg": False, "*/*": True, "*/*.png": True, "*/*/*.p?g": True,
        "photos/*/*": False, "*/*.[jJ][pP][gG]": False, "*/*.???": True, "*/*.jp*": True,
        "*/*.d": True, "maps/*": True, "maps/*.jpg": False,
    }  # fmt: skip
    assert {path: inputs.covers(path, Path("maps")) for path in covered} == covered
    assert inputs.covers("odd[1]", Path("odd[1]/maps"))
    assert inputs.covers("*/maps", Path("photos/maps/x"))
    assert not inputs.covers("*.jpg", Path("maps/x.jpg.d/y"))
    assert inputs.covers("photos/*/*", Path("photos/maps"))
    assert inputs.covers("photos/*/*.png", Path("photos/a"))
    assert not inputs.covers("photos/*/*.jpg", Path("photos/maps"))


def test_an_endless_list_is_read_only_as_needed(small_runs: Path, tmp_path: Path) -> None:
    """The first verdict does not wait for the end of the list."""
    (tmp_path / "a.jpg").write_bytes(encode(photo(1)))
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield str(tmp_path / "a.jpg")

    files = inputs.find_images(endless(), Counter())
    predictions = load_detector(runs=small_runs).stream(files)
    next(predictions)
    assert len(taken) == 2
    for _ in range(200):
        next(predictions)
    assert len(taken) < 201 + 4 * 32
    predictions.close()


def test_an_empty_path_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photo(1)))
    monkeypatch.chdir(tmp_path)
    (file,) = inputs.find_images([""], Counter())
    assert file.name == ""
    with pytest.raises(FileNotFoundError):
        file.read()


def test_what_is_not_skipped_is_not_counted(tmp_path: Path) -> None:
    text = {"not an image by its name (.txt)": 1}
    for names, skipped in ((("a.jpg", "b.png"), {}), (("a.jpg", "b.txt"), text)):
        excluded = Counter[str]()
        path = write_tar(tmp_path / "x.tar", dict.fromkeys(names, encode(photo(1))))
        assert len(list(inputs.find_images([str(path)], excluded))) == 2 - len(skipped)
        assert dict(excluded) == skipped


def test_camera_raws_and_archives_in_archives_are_named_by_what_they_are(tmp_path: Path) -> None:
    for name in ("IMG.DNG", "b.dng", "notes.txt", "c"):
        (tmp_path / name).touch()
    inner = dict.fromkeys(("x.zip", "x.tar.gz", "x.nef"), b"")
    archives = write_zip(tmp_path / "a.zip", inner), write_tar(tmp_path / "a.tar", inner)
    excluded = Counter[str]()
    assert not list(inputs.find_images([str(tmp_path), *map(str, archives)], excluded))
    assert excluded == {
        "an archive (name it to look inside)": 2,
        "an archive in an archive, which is not read; unpack it": 4,
        "not an image by its name (.dng)": 2,
        "not an image by its name (.nef)": 2,
        "not an image by its name (.txt)": 1,
        "not an image by its name (no extension)": 1,
    }


@pytest.mark.parametrize("pattern", ["**", "p/**", "p", "**/p", "p/**/", "p/**/**"])
def test_a_pattern_yields_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p/a/p").mkdir(parents=True)
    for name in ("x.jpg", "a/y.jpg", "a/p/z.png", "a/notes.txt"):
        (tmp_path / "p" / name).touch()
    excluded = Counter[str]()
    names = [os.path.normpath(file.name) for file in inputs.find_images([pattern], excluded)]
    assert sorted(names) == ["p/a/p/z.png", "p/a/y.jpg", "p/x.jpg"]
    assert excluded == {"not an image by its name (.txt)": 1}


def test_a_link_loop_and_a_name_that_is_too_long_end_no_run(tmp_path: Path) -> None:
    image = encode(photo(1))
    for name in ("a.jpg", "z.jpg"):
        (tmp_path / name).write_bytes(image)
    (tmp_path / "loop").symlink_to("loop")
    listed = [file.name for file in inputs.find_images([str(tmp_path)], Counter())]
    assert listed == [str(tmp_path / "a.jpg"), str(tmp_path / "z.jpg")]
    names = [str(tmp_path / "a.jpg"), str(tmp_path / ("x" * 300)), str(tmp_path / "z.jpg")]
    assert [file.name for file in inputs.find_images(names, Counter())] == names


def test_a_shard_that_is_missing_from_a_set_is_an_unreadable_image(
    data: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(data / "old", tmp_path / "old"))
    (gone, *_) = sorted(shards.glob("*.tar"))
    before = len(list(inputs.find_images([str(shards)], Counter())))
    gone.unlink()
    files = list(inputs.find_images([str(shards)], Counter()))
    assert len(files) < before
    (missing,) = [file for file in files if file.name == str(gone)]
    with pytest.raises(DecodeError, match=r"listed in index\.json, but missing"):
        missing.read()
