"""The results file: no existing file is lost, and every row can be read again."""

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import PngImagePlugin

import predict
from model.inference import results
from model.inference.provenance import MAX_EVIDENCE, Evidence
from model.inference.results import COLUMNS, ResultsError, line, open_results, unfinished_of
from tests.builders import ROOT, encode, photo

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MADE_BY = "run/step_0000001 12345678"


def row(path: str, **changes: object) -> dict:
    values = results.row(
        path=path,
        probability=0.5,
        verdict="uncertain",
        error="",
        provenance=[],
        checkpoint=MADE_BY,
    )
    assert tuple(values) == COLUMNS
    return values | changes


def finished(path: Path, *names: str, made_by: str = MADE_BY) -> Path:
    """Write a finished file with these images, and return its path."""
    output = path.suffix[1:]
    file = open_results(path, output, made_by, resume=False)
    for name in names:
        file.write(line(output, row(name, checkpoint=made_by)))
    file.finish()
    file.close()
    return path


FOREIGN = {
    "notes.csv": b"date,note\n2026-01-01,first\n2026-01-02,no line end",
    "whole.csv": b"date,note\n2026-01-01,first\n",
    "one.csv": b"remember the milk",
    "line.csv": b"remember the milk\n",
    "header.csv": b"path,probability,verdict\n",
    "cells.csv": ",".join(COLUMNS).encode() + b"\na,b\n",
    "quote.csv": b'a,"b',
    "one.jsonl": b'{"a": 1}',
    "line.jsonl": b'{"a": 1}\n',
    "list.jsonl": json.dumps(COLUMNS).encode() + b"\n",
    "number.jsonl": b"1\n",
    "text.jsonl": b"remember\nthe milk",
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "picture.csv": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("as_partial", [False, True])
def test_a_foreign_file_is_refused_and_untouched(
    tmp_path: Path, name: str, as_partial: bool
) -> None:
    path = tmp_path / name
    kept = unfinished_of(path) if as_partial else path
    kept.write_bytes(FOREIGN[name])
    before = kept.stat()
    with pytest.raises(ResultsError, match="name another file with --out"):
        open_results(path, path.suffix[1:], MADE_BY, resume=True)
    assert kept.read_bytes() == FOREIGN[name]
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("output", ["csv", "jsonl"])
@pytest.mark.parametrize("cut", [0, 3])
def test_a_finished_file_of_another_detector_or_cut_off_is_refused_and_untouched(
    tmp_path: Path, output: str, cut: int
) -> None:
    path = finished(tmp_path / f"x.{output}", "a", "b", made_by=MADE_BY if cut else "another 1")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with pytest.raises(ResultsError, match="does not end as" if cut else "made by another 1"):
        open_results(path, output, MADE_BY, resume=True)
    assert path.read_bytes() == whole[: len(whole) - cut]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_a_finished_file_stays_until_the_longer_one_is_finished(
    tmp_path: Path, output: str
) -> None:
    path = finished(tmp_path / f"x.{output}", "a", "b")
    whole = path.read_bytes()
    for size in (None, 0, 5, len(whole)):  # a kill during copying leaves a part of the file
        if size is not None:
            unfinished_of(path).write_bytes(whole[:size])
        file = open_results(path, output, MADE_BY, resume=True)
        assert "a" in file and "b" in file and "c" not in file
        assert path.read_bytes() == unfinished_of(path).read_bytes() == whole
        file.close()
    file = open_results(path, output, MADE_BY, resume=True)
    file.write(line(output, row("c")))
    file.close()
    assert path.read_bytes() == whole
    file = open_results(path, output, MADE_BY, resume=True)
    assert "c" in file
    file.finish()
    file.close()
    assert path.read_bytes().startswith(whole) and path.stat().st_size > len(whole)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_only_new_rows_are_left_in_an_unfinished_file(tmp_path: Path, output: str) -> None:
    """Without a new row, an unfinished file would make the next command need `--resume`."""
    path = tmp_path / f"x.{output}"
    open_results(path, output, MADE_BY, resume=False).close()
    assert not list(tmp_path.iterdir())
    finished(path, "a")
    open_results(path, output, MADE_BY, resume=True).close()
    assert list(tmp_path.iterdir()) == [path]
    for again in (False, True):  # the second time, the new row is there already
        file = open_results(path, output, MADE_BY, resume=True)
        assert ("b" in file) == again
        if not again:
            file.write(line(output, row("b")))
        file.close()
        file.close()
        assert unfinished_of(path).stat().st_size > path.stat().st_size
    path.unlink()
    open_results(path, output, MADE_BY, resume=True).close()
    assert unfinished_of(path).exists()


def test_closing_a_finished_file_leaves_that_of_another_process(tmp_path: Path) -> None:
    path = finished(tmp_path / "x.csv", "a")
    file = open_results(path, "csv", MADE_BY, resume=True)
    file.finish()
    unfinished_of(path).touch()
    file.close()
    assert unfinished_of(path).exists()


def test_two_conflicting_files_are_both_kept(tmp_path: Path) -> None:
    other = finished(tmp_path / "y.csv", "c", "d", "e").read_bytes()
    path = finished(tmp_path / "x.csv", "a", "b")
    unfinished_of(path).write_bytes(other)
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="neither begins with the other"):
        open_results(path, "csv", MADE_BY, resume=True)
    assert (path.read_bytes(), unfinished_of(path).read_bytes()) == (before, other)


def test_only_one_process_can_write_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    file = open_results(path, "csv", MADE_BY, resume=False)
    other = (
        "import sys; from pathlib import Path; from model.inference.results import open_results\n"
        f"open_results(Path({str(path)!r}), 'csv', {MADE_BY!r}, resume=True)"
    )
    command = [sys.executable, "-c", other]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "another process is writing" in done.stderr
    file.close()
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_folder_or_pipe_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.csv"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(ResultsError, match="not a regular file"):
        open_results(path, "csv", MADE_BY, resume=True)
    with pytest.raises(ResultsError, match="there is no folder"):
        open_results(tmp_path / "none" / "x.csv", "csv", MADE_BY, resume=False)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """A file size limit acts like a full disk: half a row is written, then writing fails."""
    path = tmp_path / "x.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = open_results(path, "csv", MADE_BY, resume=False)
    file.until = 1e9
    text = line("csv", row("a" * 100))
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        file.write(text)
        with pytest.raises(OSError) as raised:
            file.write(text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.close()
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(unfinished_of(path))
    assert unfinished_of(path).stat().st_size == 300
    again = open_results(path, "csv", MADE_BY, resume=True)
    assert again.until == 1e9  # changes after it have no row
    assert "a" * 100 in again
    again.close()
    assert unfinished_of(path).read_text() == f"{','.join(COLUMNS)}\n{text}\n"


NAMES = ["=1+1.jpg", "'=1.jpg", "+a.jpg", "@b.jpg", "-c.jpg", 'qu"ote', "new\nline", "\r", "a\0b",
         "\ufeffx", os.fsdecode(b"\xe9"), "é", "x" * 4000]  # fmt: skip


def test_a_change_before_the_last_row_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was written while the rows were, or that a file with an older time replaced."""
    image, other, out = tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "out.csv"
    other.write_bytes(b"other")
    os.utime(other, (1, 1))
    file = open_results(out, "csv", MADE_BY, resume=False)
    file.write(line("csv", row(str(image))))
    image.write_bytes(b"changed")
    file.write(line("csv", row("last")))
    file.finish()
    file.close()
    again = open_results(out, "csv", MADE_BY, resume=True)
    assert again.is_older_than(str(image))
    monkeypatch.setattr(time, "time", lambda: image.stat().st_ctime + 9)
    again.reach(image.stat().st_ctime + 1)
    assert again.is_older_than(str(image))  # the time may be rounded down, or of another clock
    again.reach(image.stat().st_ctime + 3)
    assert not again.is_older_than(str(image))
    again.write(line("csv", row("later")))
    again.finish()
    again.close()
    resumed = open_results(out, "csv", MADE_BY, resume=True)
    assert not resumed.is_older_than(str(image))
    resumed.until = image.stat().st_ctime - 60
    other.replace(image)
    assert resumed.is_older_than(str(image))
    resumed.close()


def test_cutting_off_an_incomplete_row_does_not_hide_earlier_changes(tmp_path: Path) -> None:
    out, image = tmp_path / "out.csv", tmp_path / "a.jpg"
    partial = finished(out, "a.jpg").rename(unfinished_of(out))
    partial.write_bytes(partial.read_bytes() + b"half a")
    os.utime(partial, (1e9, 1e9))
    image.write_bytes(b"changed")
    for _ in range(2):
        file = open_results(out, "csv", MADE_BY, resume=True)
        assert file.is_older_than(str(image))
        file.close()


@pytest.mark.parametrize("copied", [0.5, 1])
def test_a_killed_copy_of_the_finished_file_does_not_hide_changes(
    tmp_path: Path, copied: float
) -> None:
    out = finished(tmp_path / "out.csv", "a.jpg", "b.jpg")
    os.utime(out, (1e9, 1e9))
    rows = out.read_bytes()
    unfinished_of(out).write_bytes(rows[: int(copied * len(rows))])
    file = open_results(out, "csv", MADE_BY, resume=True)
    assert file.until == 1e9
    assert unfinished_of(out).stat().st_mtime == 1e9
    file.close()


def test_a_copied_or_killed_results_file_hides_no_changes(tmp_path: Path) -> None:
    """A copy has the time of the copy, and a file the time of its last write if a kill follows."""
    image, out = tmp_path / "a.jpg", finished(tmp_path / "out.csv", str(tmp_path / "a.jpg"))
    image.write_bytes(b"changed")
    later = time.time_ns() // 10**9 * 10**9 + 1
    for path in (out, unfinished_of(tmp_path / "killed.csv")):
        path.write_bytes(out.read_bytes())
        os.utime(path, ns=(later - 10**9, later - 10**9))
    for name in ("out.csv", "killed.csv"):
        for _ in range(2):  # the second time, the first one was killed before it knew better
            file = open_results(tmp_path / name, "csv", MADE_BY, resume=True)
            assert file.until == 0 and file.is_older_than(str(image))
            file.write(line("csv", row("b.jpg")))
            file.close()


def test_a_clock_that_was_ahead_hides_no_changes(tmp_path: Path) -> None:
    image, out = tmp_path / "a.jpg", finished(tmp_path / "out.csv", str(tmp_path / "a.jpg"))
    now = round(time.time())
    os.utime(out, (now + 3600, now + 3600))
    image.write_bytes(b"changed")
    file = open_results(out, "csv", MADE_BY, resume=True)
    assert file.until == 0 and file.is_older_than(str(image))
    file.until = now + 3600.0  # its clock is set right while it runs
    file.reach(now)
    assert file.until == unfinished_of(out).stat().st_mtime == now
    file.close()


def test_a_disk_that_stores_no_times_has_those_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object, **_options: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refused)
    out = finished(tmp_path / "out.csv", "a.jpg")
    file = open_results(out, "csv", MADE_BY, resume=True)
    assert file.until == pytest.approx(out.stat().st_mtime, abs=1e-3)
    file.close()


def test_a_name_beyond_the_limit_of_the_csv_module_can_be_read_again(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = finished(tmp_path / "out.csv", "x" * 140_000)
    file = open_results(path, "csv", MADE_BY, resume=True)
    assert "x" * 140_000 in file
    file.close()
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_every_row_can_be_read_again(tmp_path: Path, output: str) -> None:
    path = finished(tmp_path / f"x.{output}", *NAMES)
    file = open_results(path, output, MADE_BY, resume=True)
    assert len(file.names) == len(NAMES)
    assert all(name in file for name in NAMES)
    file.close()
    if output == "csv":
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert [one["path"] for one in rows[:3]] == ["'=1+1.jpg", "''=1.jpg", "'+a.jpg"]
        assert not any(cell[:1] in "=+-@" for one in rows for cell in one.values() if cell)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = finished(tmp_path / "out.csv", "a.jpg")
    path.write_bytes(path.read_bytes().replace(b"a.jpg", b"\xff.jpg"))
    with pytest.raises(ResultsError, match="is not a csv file of this program"):
        open_results(path, "csv", MADE_BY, resume=True)


def test_text_from_a_file_cannot_become_a_spreadsheet_formula(tmp_path: Path) -> None:
    said = [Evidence("=HYPERLINK(1)", "x", "y")]
    text = line("csv", row("a", error="@SUM(1)", provenance=said))
    (cells,) = csv.reader([text])
    assert cells[3] == "'@SUM(1)" and cells[4].startswith("'=HYPERLINK")


@pytest.fixture
def ask(small_runs: Path) -> Callable[..., Result]:
    """Return a function that runs `predict.py` with the given arguments."""

    def run(*arguments: object) -> Result:
        command = [*map(str, arguments), "--runs", str(small_runs)]
        return CliRunner().invoke(predict.main, command)

    return run


def test_an_image_with_15000_lines_of_metadata_makes_a_file_that_can_be_read(
    ask: Callable[..., Result], tmp_path: Path
) -> None:
    said = PngImagePlugin.PngInfo()
    for number in range(15_000):
        settings = f"Steps: 20, Sampler: Euler, CFG scale: 7, Seed: {number}, {'é' * 300}"
        said.add_text(f"parameters{number}", settings)
    (tmp_path / "a.png").write_bytes(encode(photo(1), "PNG", pnginfo=said))
    out = tmp_path / "out.csv"
    assert ask(tmp_path / "a.png", "--out", out).exit_code == 0
    (row,) = csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"), newline=""))
    assert row["provenance"].count("generator: ") == MAX_EVIDENCE - 1
    result = ask(tmp_path / "a.png", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    assert f"nothing new: the image is in {out}" in result.stderr


def test_predict_ends_with_1_when_the_disk_is_full(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photo(1)))
    out = tmp_path / "out.csv"
    opened = results.open_results

    def on_a_full_disk(*arguments: object) -> results.ResultsFile:
        file = opened(*arguments)
        file.stream.close()
        file.stream = open("/dev/full", "wb", buffering=0)  # noqa: PTH123
        return file

    monkeypatch.setattr(results, "open_results", on_a_full_disk)
    result = ask(tmp_path / "a.jpg", "--out", out)
    assert result.exit_code == 1
    assert f"{unfinished_of(out)}: No space left on device" in result.stderr
    assert "Traceback" not in result.output
    assert not out.exists()


def test_a_heatmap_that_is_not_possible_stops_before_a_file_is_made(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photo(1)))
    monkeypatch.setitem(sys.modules, "captum", None)  # it is not installed
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    maps, out = tmp_path / "maps", tmp_path / "out.csv"
    result = ask(tmp_path / "a.jpg", "--heatmap", maps, "--out", out)
    assert result.exit_code == 2 and "a heatmap needs the library captum" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_run_that_fails_before_its_first_row_leaves_no_file(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photo(1)))
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out.csv"

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("model.inference.detector.ImageDetector.score", fail)
        for error in (RuntimeError("no memory"), KeyboardInterrupt()):
            result = ask(tmp_path / "a.jpg", "--out", out)
            assert result.exit_code == (1 if isinstance(error, RuntimeError) else 130)
            assert "rows so far" not in result.stderr
            assert not unfinished_of(out).exists()
    assert ask(tmp_path / "a.jpg", "--out", out).exit_code == 0
    assert ask(tmp_path / "empty", "--out", out, "--resume").exit_code == 2
    assert out.exists() and not unfinished_of(out).exists()


def test_a_file_is_looked_at_before_anything_is_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    before = tmp_path.stat().st_mtime_ns
    with pytest.raises(ResultsError, match="is not a regular file"):
        open_results(tmp_path / "x.csv", "csv", "a", resume=False)
    assert tmp_path.stat().st_mtime_ns == before
