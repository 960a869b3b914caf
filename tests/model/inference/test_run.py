"""`predict.py --resume` after an interruption: whole batches, no duplicate or missing row."""

import csv
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import predict
from imaging.decode import ImageFile
from model.inference import detector, inputs, results
from model.inference.prediction import Prediction
from model.inference.run import PredictionRun, count_in_background, heatmap_path
from tests.builders import encode, photo, write_tar

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def ask(small_runs: Path) -> Callable[..., Result]:
    """Return a function that runs `predict.py` with the given arguments."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(predict.main, [*map(str, arguments), "--runs", str(small_runs)])

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder with three images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(encode(photo(number)))
    return folder


NAMES = (
    'qu"ote.jpg',
    "new\nline.jpg",
    "comma, and space.jpg",
    "ümlaut.jpg",
    os.fsdecode(b"\xff.jpg"),
)


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_a_resumed_run_has_no_duplicate_and_no_missing_row(
    ask: Callable[..., Result], tmp_path: Path, output: str
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(encode(photo(number)))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no")
    out = tmp_path / f"out.{output}"
    result = ask(folder, "--out", out)
    assert result.exit_code == 1
    assert r"1 name is not UTF-8: such bytes are written as escapes, such as \xff" in result.stderr
    whole = out.read_bytes()
    assert ask(folder, "--out", out).exit_code == 2, "an existing file must not be overwritten"
    rows = read(whole, output)
    names = (*NAMES[:-1], r"\xff.jpg", "broken.jpg")
    assert rows.keys() == {str(folder / name) for name in names}
    assert all(name.encode() for name in rows)  # no single surrogate
    partial = results.unfinished_of(out)
    for cut in (0, 3, len(whole) // 3, len(whole) // 2, len(whole) - 3, len(whole)):
        out.unlink(missing_ok=True)
        partial.write_bytes(whole[:cut])
        result = ask(folder, "--out", out, "--resume")
        assert result.exit_code == 1, result.output  # 1 because of the broken image
        assert not partial.exists()
        assert out.read_bytes() == whole, f"cut at {cut}"
    (folder / "later.jpg").write_bytes(encode(photo(9)))
    result = ask(folder, "--out", out, "--resume")
    assert "1 image (6 were done before)" in result.stderr
    result = ask(folder, "--out", out, "--resume", "--threshold", "0.9")
    assert result.exit_code == 2
    assert "another checkpoint, calibration or threshold" in result.stderr


def test_a_resumed_run_scores_whole_batches_of_the_list_again(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding depends on the batch size, so a batch is always scored completely."""
    folder, out = tmp_path / "images", tmp_path / "out.csv"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02}.jpg").write_bytes(encode(photo(number)))
    sizes: list[int] = []
    score = detector.ImageDetector.score

    def recorded(self: Any, pixels: Any) -> Any:
        sizes.append(len(pixels))
        return score(self, pixels)

    monkeypatch.setattr(detector.ImageDetector, "score", recorded)
    arguments = (folder, "--out", out, "--batch-size", "8")
    assert ask(*arguments).exit_code == 0
    assert sizes == [1, 4, 8, 8, 3]
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)  # the first is the header
    for rows, expected in ((0, [1, 4, 8, 8, 3]), (1, [4, 8, 8, 3]), (9, [8, 8, 3]), (24, [])):
        out.unlink()
        results.unfinished_of(out).write_bytes(b"".join(lines[: rows + 1]))
        sizes.clear()
        result = ask(*arguments, "--resume")
        assert result.exit_code == 0, result.output
        assert sizes == expected, f"{rows} rows were there"
        assert out.read_bytes() == whole
    (folder / "00b.jpg").write_bytes(encode(photo(30)))
    sizes.clear()
    assert ask(*arguments, "--resume").exit_code == 0
    assert sizes == [4], "only the batch with the new image"
    assert len(out.read_bytes().splitlines()) == 26


def read(data: bytes, output: str) -> dict[str, dict]:
    text = data.decode()  # every byte is UTF-8, whatever the names
    written = (
        list(csv.DictReader(io.StringIO(text, newline="")))
        if output == "csv"
        else [json.loads(line) for line in text.split("\n")[:-1]]
    )
    rows = {row["path"]: row for row in written}
    assert len(rows) == len(written)
    return rows


def test_results_are_written_immediately(
    ask: Callable[..., Result], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption, all scored images are in the file."""
    out, seen = tmp_path / "out.jsonl", []
    write = results.ResultsFile.write

    def interrupted(file: results.ResultsFile, text: str) -> None:
        write(file, text)
        seen.append(len(results.unfinished_of(out).read_bytes().splitlines()))
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.ResultsFile, "write", interrupted)
    result = ask(photos, "--out", out)
    assert result.exit_code == 130
    assert seen == [1, 2]
    assert "stopped after 2 images" in result.stderr
    assert "--resume continues them" in result.stderr
    monkeypatch.setattr(results.ResultsFile, "write", write)
    assert ask(photos, "--out", out, "--resume").exit_code == 0
    assert len(out.read_bytes().splitlines()) == 3


def test_heatmaps_of_images_with_similar_paths_have_different_names(tmp_path: Path) -> None:
    names = ["a/x.jpg", "/a/x.jpg", "../a/x.jpg", "../../a/x.jpg", "a/../a/x.jpg", "/../a/x.jpg"]
    paths = [heatmap_path(name, tmp_path) for name in names]
    assert paths[0] == tmp_path / "a/x.jpg.png"
    assert len(set(paths)) == len(names)
    assert all(path.is_relative_to(tmp_path) and ".." not in path.parts for path in paths)
    assert paths[1] == heatmap_path("/a/x.jpg", tmp_path)
    assert heatmap_path("./a//x.jpg", tmp_path) == paths[0]


def test_a_changed_file_is_scored_again_by_a_resumed_watch(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "in/latest.png", tmp_path / "out.csv"
    file.parent.mkdir()
    file.write_bytes(encode(photo(1), "PNG"))
    os.utime(file, (1, 1))
    assert ask(file.parent, "--out", out).exit_code == 0
    looks = []

    def sleep(_seconds: float) -> None:
        looks.append(1)
        if len(looks) == 1:
            file.write_bytes(encode(photo(2, 60, 50), "PNG"))
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "SETTLED_S", 0.0)
    monkeypatch.setattr(results, "TICK_S", 0.0)  # so that images need not be older than the run
    monkeypatch.setattr(inputs.time, "sleep", sleep)
    result = ask("--watch", file.parent, "--out", out, "--resume")
    assert result.exit_code == 0 and "scored again" not in result.stderr
    rows = out.read_text().splitlines()[1:]
    assert len(rows) == 2 and rows[0] != rows[1]
    looks[:] = [1, 1]
    os.utime(out, ns=(1, 1))  # as a copy has another time
    result = ask("--watch", file.parent, "--out", out, "--resume")
    assert "a kill): all images are scored again" in result.stderr
    assert out.read_text().splitlines()[1:] == [*rows, rows[1]]


def test_a_resumed_watch_scores_what_changed_in_between_and_nothing_twice(
    ask: Callable[..., Result], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a file either that the first look leaves out, because its time is in the future."""
    out = tmp_path / "out.csv"
    os.utime(photos / "0.jpg", (4e9, 4e9))
    assert ask(photos, "--out", out).exit_code == 0
    (photos / "1.jpg").write_bytes(encode(photo(8)))
    looks = []

    def sleep(_seconds: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "SETTLED_S", 0.0)
    monkeypatch.setattr(results, "TICK_S", 0.0)  # so that images need not be older than the run
    monkeypatch.setattr(inputs.time, "sleep", sleep)
    for _ in range(2):
        looks.clear()
        assert ask("--watch", photos, "--out", out, "--resume").exit_code == 0
        rows = csv.DictReader(io.StringIO(out.read_text()))
        names = [Path(row["path"]).name for row in rows]
        assert sorted(names[:3]) == ["0.jpg", "1.jpg", "2.jpg"]
        assert names[3:] == ["1.jpg"]


def test_a_resumed_run_draws_the_heatmaps_that_are_missing(
    ask: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no")
    out, maps = tmp_path / "out.csv", tmp_path / "maps"
    assert ask(photos, "--out", out).exit_code == 1
    before = out.read_bytes()
    result = ask(photos, "--out", out, "--resume", "--heatmap", maps)
    assert result.exit_code == 1
    assert "score them into another --out" in result.stderr
    assert out.read_bytes() == before
    images = [heatmap_path(str(photos / f"{number}.jpg"), maps) for number in range(3)]
    assert sorted(maps.rglob("*.png")) == sorted(images)


def test_a_finished_run_over_a_compressed_tar_is_resumed(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members that are passed over must not fill the memory for members that wait."""
    images = {f"{number}.png": encode(photo(number), "PNG") for number in range(12)}
    archive, out = write_tar(tmp_path / "a.tar.gz", images, "w:gz"), tmp_path / "out.csv"
    monkeypatch.setattr("imaging.tar.WAITING_BYTES", 2 * len(images["0.png"]))
    assert ask(archive, "--out", out).exit_code == 0
    before = out.read_bytes()
    result = ask(archive, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == before


def test_a_compressed_tar_that_is_named_tar_is_resumed_and_not_counted(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first bytes say that it is compressed. Neither the run nor the count waits forever."""
    images = {f"{number}.bmp": encode(photo(number), "BMP") for number in range(12)}
    archive, out = write_tar(tmp_path / "a.tar", images, "w:gz"), tmp_path / "out.csv"
    monkeypatch.setattr("imaging.tar.WAITING_BYTES", 2 * len(images["0.bmp"]))
    assert ask(archive, "--out", out).exit_code == 0
    before, running = out.read_bytes(), threading.enumerate()
    counted: list[int] = []
    for paths in ((str(archive),), (f"{tmp_path}/*.tar",), (str(tmp_path), str(archive))):
        count_in_background(paths, counted)
    for thread in threading.enumerate():
        if thread not in running:
            thread.join(timeout=30)
            assert not thread.is_alive()
    assert counted == []
    result = ask(archive, "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert out.read_bytes() == before


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_images_of_one_name_each_have_a_row_also_after_an_interruption(
    ask: Callable[..., Result], photos: Path, tmp_path: Path, output: str
) -> None:
    out, archive = tmp_path / f"out.{output}", tmp_path / "same.tar"
    with tarfile.open(archive, "w") as tar:
        for number in range(3):
            data = encode(photo(number), "PNG")
            member = tarfile.TarInfo("same.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for paths, rows in (((archive,), 3), ((photos, photos / "1.jpg"), 4)):
        assert ask(*paths, "--out", out).exit_code == 0
        whole = out.read_bytes()
        lines = whole.splitlines(keepends=True)
        header = len(lines) - rows
        assert len(set(lines)) == header + 3
        for kept in range(rows + 1):
            out.unlink()
            results.unfinished_of(out).write_bytes(b"".join(lines[: header + kept]))
            assert ask(*paths, "--out", out, "--resume").exit_code == 0
            assert out.read_bytes() == whole, f"{kept} rows were there"
        out.unlink()


def test_an_index_of_another_program_hides_nothing(
    ask: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(encode(photo(1), "PNG"))
    (tmp_path / "notes.txt").write_text("none")
    write_tar(tmp_path / "more.tar", {"b.png": encode(photo(2), "PNG")})
    result = ask(tmp_path, "--format", "jsonl")
    names = [json.loads(line)["path"] for line in result.stdout.splitlines()]
    assert [Path(name).name for name in names] == ["a.png"]
    assert "an archive (name it to look inside)" in result.stderr


def test_a_resumed_run_counts_the_rows_that_it_passes_over() -> None:
    """A million rows were half a minute without a sign, which looked as if it hung."""
    files = [ImageFile(str(number), bytes) for number in range(100)]
    out: Any = SimpleNamespace(names=range(99), take=lambda name: name != "99")
    scored: list[ImageFile] = []

    def stream(images: Iterator[ImageFile], *_options: int) -> Iterator[Prediction]:
        scored.extend(images)
        yield from ()

    counts = []
    detector: Any = SimpleNamespace(stream=stream)
    for count in PredictionRun(detector, "csv", out).over(files, 8):
        assert not scored
        counts.append(count)
    assert len(counts) > 10 and counts == sorted(counts) and counts[-1] >= 92
    assert scored[-1].name == "99"
