"""The history of a run: rows after a kill, and files that are none or are damaged."""

import json
import tracemalloc
from pathlib import Path

import pytest

import storage
from model.tracking.history import HISTORY_FILE, History, rows_of

ROWS = [{"step": step, "kind": "train", "loss": 1 / step} for step in (1, 2, 3)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


@pytest.mark.parametrize("end", [b"", b'{"step": 4, "ki', b"\0" * 40, b"\0\0\n", b'{"step": 4}\n'])
def test_an_incomplete_end_is_ignored_and_rows_after_the_checkpoint_are_removed(
    end: bytes, tmp_path: Path
) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b"".join(LINES) + end)
    assert [*rows_of(tmp_path)] == ROWS
    with History(tmp_path, 2) as history:
        history.write(3, "train", {"loss": 0.5})
    assert [*rows_of(tmp_path)] == [*ROWS[:2], {"step": 3, "kind": "train", "loss": 0.5}]


@pytest.mark.parametrize(
    "bad",
    [
        b"oops\n", b"\0\0\0\n", b'{"step": 2}\n', b"[1]\n", b'{"step": "x", "kind": "train"}\n',
        b'{"step": [], "kind": "train"}\n', b'{"step": 2, "kind": 5}\n',
        b'{"step": 1%b, "kind": "train"}\n' % (b"0" * 400),
    ],
)  # fmt: skip
def test_rows_after_a_damaged_line_are_never_dropped_in_silence(bad: bytes, tmp_path: Path) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_bytes(LINES[0] + bad + LINES[2])
    for read in (lambda folder: list(rows_of(folder)), lambda folder: History(folder, 3)):
        with pytest.raises(
            ValueError, match=r"metrics.jsonl, line 2: .* is no row, and rows follow"
        ):
            read(tmp_path)
    assert path.read_bytes() == LINES[0] + bad + LINES[2]


def test_another_file_of_this_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / HISTORY_FILE).write_text("a diary\n")
    with pytest.raises(ValueError, match=r"is no history of a run .*--run NAME"):
        list(rows_of(tmp_path))


def test_a_history_of_any_length_is_read_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose history had grown beyond the limit of a file could not be resumed, or drawn."""
    monkeypatch.setattr(storage.read_plain, "__defaults__", (1000,))
    (tmp_path / HISTORY_FILE).write_bytes(LINES[0] * 6000 + b"".join(LINES))
    before = (tmp_path / HISTORY_FILE).stat()
    with History(tmp_path / "other", 0):
        pass  # what TensorBoard imports is not measured
    tracemalloc.start()
    try:
        with History(tmp_path, 3):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < before.st_size / 2
    after = (tmp_path / HISTORY_FILE).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with History(tmp_path, 1):
        pass
    assert [*rows_of(tmp_path)] == ROWS[:1] * 6001


def test_rows_of_a_validation_that_is_still_to_be_done_are_removed(tmp_path: Path) -> None:
    """A run that was killed between them and its checkpoint writes them again."""
    with History(tmp_path, 0) as history:
        for step in (4, 5):
            for kind in ("train", "validate", "validate/val"):
                history.write(step, kind, {"loss": 0.5})
    with History(tmp_path, 5, validated=False):
        pass
    rows = [(row["step"], row["kind"]) for row in rows_of(tmp_path)]
    assert rows == [(4, "train"), (4, "validate"), (4, "validate/val"), (5, "train")]
