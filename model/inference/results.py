"""Format predictions as a table, CSV or JSON lines, and write them to a results file that can be
resumed.

Main entries: `line(output, row)` returns the text of one image, without a newline at the end.
`header(output, word)` returns the first line of the results ("" for JSON lines).

- `output`: a format of `FORMATS`: "table", "csv" or "jsonl".
- `row`: a dict with the keys `COLUMNS`, in this order: `path`, `probability` (a number, or None),
  `verdict`, `error` ("" if there is none), `provenance` (a list of `Evidence`: what the metadata of
  the file says) and `checkpoint` (`detector.identity`). The others are texts. `row(path=...)` makes
  such a dict from the six values.
- `word`: the title of the column of probabilities in a table (default "probability").

`open_results(path, output, checkpoint, resume)` opens a file for such texts.

- `path`: `Path` of the file, in an existing folder.
- `output`: the format of the file, as above.
- `checkpoint`: a text that identifies the detector and its threshold, `detector.identity`.
- `resume`: whether an existing file is continued: a finished one at `path`, or one at
  `unfinished_of(path)`, which an interrupted run leaves. A table cannot be continued.

It returns a locked `ResultsFile`. On disk it is named `unfinished_of(path)`; `finish()` renames it
to `path`, and `close()` releases the lock, and deletes an unfinished file without new rows.
`write(text)` appends a text and a newline: the result of `line()`, and in a new table first
`write(header("table"))`. A new CSV file has its header, JSON lines need none. `name in file` says
whether an image of this name had a row when the file was opened, and `take(name)` whether it had
more of them than were taken before. `unreadable` is the number of rows without a verdict at that
time. `reach(until)` states that the rows have all changes of the images before a Unix time, and
`is_older_than(path)` says whether a file changed after the time that was stated last, `until`: it
is the modification time of the file on disk, in whole milliseconds, and begins with the time at
which the file is new. It is 0 if the file has another time: a copy, a kill, a clock that was ahead.
`OSError` is raised if the file cannot be opened or written, and `ResultsError` in these cases:

- `path` or `unfinished_of(path)` exists and `resume` is false, or one of them is no regular file.
- Another process writes the file, or its folder is missing.
- With `resume`: the existing file is a table, or was made by another detector, threshold or format,
  or has a damaged row (an incomplete last row of `unfinished_of(path)` is dropped); or both files
  exist, and neither begins with all bytes of the other.
"""

import contextlib
import csv
import hashlib
import io
import os
import sys
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from escape import as_json, as_utf8, from_spreadsheet_cell, printable, spreadsheet_cell
from locks import locked
from storage import parse_json, publish

COLUMNS = ("path", "probability", "verdict", "error", "provenance", "checkpoint")
"""Columns of a result, in this order. `probability` is the probability of AI-generated (a score if
the checkpoint is not calibrated). `error` is the reason if there is no probability. `provenance` is
the evidence in the file. `checkpoint` is the identity of the detector and its band.
"""

FORMATS = ("table", "csv", "jsonl")

TICK_S = 2.0
"""Seconds by which a file's time of change may be too early: systems round it down, some to 2 s,
and the clock of a file server may be slow.
"""


def header(output: str, word: str = "probability") -> str:
    """Return the header line of a format; "" for JSON lines. `word` titles a table's numbers."""
    if output == "table":
        return f"{word:>11}  {'verdict':<13}  file"
    return ",".join(COLUMNS) if output == "csv" else ""


def row(
    *,
    path: str,
    probability: float | None,
    verdict: str,
    error: str,
    provenance: Sequence[Any],
    checkpoint: str,
) -> dict[str, Any]:
    """Return one result: a dict with the keys `COLUMNS`, in this order."""
    values = (path, probability, verdict, error, provenance, checkpoint)
    return dict(zip(COLUMNS, values, strict=True))


def line(output: str, row: Mapping[str, Any]) -> str:
    """Format one result (keys are `COLUMNS`), without the last newline. `provenance` of `row` is a
    list of `Evidence`.
    """
    if output == "table":
        return _table_line(row)
    if output == "csv":
        stream = io.StringIO()
        values = {**row, "provenance": "; ".join(map(str, row["provenance"]))}
        cells = [
            spreadsheet_cell(as_utf8(value)) if isinstance(value, str) else value
            for value in values.values()
        ]
        # Both characters, because the writer quotes only the newline characters of its line end.
        csv.writer(stream, lineterminator="\r\n").writerow(cells)
        return stream.getvalue().removesuffix("\r\n")
    return as_json({**row, "provenance": [asdict(evidence) for evidence in row["provenance"]]})


def _table_line(row: Mapping[str, Any]) -> str:
    name = printable(row["path"]).replace("\n", "\\n")
    if row["error"]:
        return f"{'-':>11}  {row['verdict']:<13}  {name}: {printable(row['error'])}"
    lines = [f"{row['probability']:11.3f}  {row['verdict']:<13}  {name}"]
    lines += [f"{'':28}the file says: {evidence}" for evidence in row["provenance"]]
    return "\n".join(lines)


class ResultsError(ValueError):
    """Raised for a results file that cannot be written; the message says what to do."""


@dataclass(eq=False)
class ResultsFile:
    """Open results file. It has the name `<name>.partial` until `finish`, and is locked until
    `close`, which deletes it if it has no new row. `held` is the lock.

    Of the rows that were in the file when it was opened, `names` contains a sorted hash of each
    image name, uint64, and `unreadable` is the number of rows without a verdict. `until` is a Unix
    time: the rows have all changes of the images before it. 0: it is not known.
    """

    path: Path
    stream: BinaryIO
    output: str
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    unreadable: int = 0
    until: float = field(default_factory=time.time)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __post_init__(self) -> None:
        self._taken = np.zeros(len(self.names), np.uint32)

    def __contains__(self, name: str) -> bool:
        index = np.searchsorted(self.names, _hash(name))
        return bool(index < len(self.names) and self.names[index] == _hash(name))

    def take(self, name: str) -> bool:
        """Return whether a row of this name is left, and mark it as used: several images, such as
        of an archive, may have one name.
        """
        first, end = (np.searchsorted(self.names, _hash(name), side) for side in _SIDES)
        if first == end or first + self._taken[first] == end:
            return False
        self._taken[first] += 1
        return True

    def is_older_than(self, path: str) -> bool:
        """Return whether a file has changed after `until`, by its change time, which the system
        sets: a file that replaces another may have an old modification time.
        """
        try:
            changed = os.stat(path).st_ctime  # noqa: PTH116  strings, as in the list
        except OSError:
            return False
        return changed > self.until - TICK_S

    def reach(self, until: float) -> None:
        """State that the rows have all changes of the images before a Unix time."""
        was_ahead = self.until > time.time() + TICK_S  # the clock, which was corrected since
        self.until = until if was_ahead else max(self.until, until)
        self._stamp()

    def _stamp(self) -> None:
        _stamp(self.stream, self.until)

    @property
    def go_on(self) -> str:
        """End of a message that says how to continue the rows; "" for a table, which cannot be
        continued.
        """
        return "" if self.output == "table" else ", and --resume continues them"

    def write(self, text: str) -> None:
        """Append a line, unbuffered.

        Raises:
            OSError: the disk is full or missing; the message names the file.
        """
        self.write_bytes(text.encode() + b"\n")

    def write_bytes(self, data: bytes) -> None:
        """Append bytes of whole rows; raises OSError as `write`."""
        left = memoryview(data)
        try:
            while left:  # a full disk writes a part, then fails
                left = left[self.stream.write(left) :]
        except OSError as error:
            reason = f"{error.strerror}; its complete rows are kept{self.go_on}"
            raise OSError(error.errno, reason, str(unfinished_of(self.path))) from error
        finally:
            self._stamp()  # failed writes also change the file's time

    def finish(self) -> None:
        """Rename the file to its final name."""
        publish(unfinished_of(self.path), self.path)

    def close(self) -> None:
        """Close the file and release its lock. An unfinished file without rows, or with rows that
        are all in the finished file, is deleted: otherwise the next command would need `--resume`.
        """
        if self.stream.closed:
            return
        partial = unfinished_of(self.path)
        if partial.exists() and os.path.samestat(os.fstat(self.stream.fileno()), partial.stat()):
            old = self.path.stat().st_size if self.path.exists() else len(header(self.output)) + 1
            if self.stream.tell() <= old:
                partial.unlink()
        self.stream.close()
        self.held.close()


def unfinished_of(path: Path) -> Path:
    """Return the path of an unfinished results file."""
    return path.with_name(f"{path.name}.partial")


def open_results(path: Path, output: str, checkpoint: str, resume: bool) -> ResultsFile:
    """Open a results file for writing: a new file, or with `resume` also an existing one.

    A finished file stays unchanged until `finish` replaces it by the longer one. Before anything is
    written, every row is read and checked to be of this `checkpoint` and format.

    Raises:
        ResultsError: the file exists and `resume` is off, another process is writing it, or it was
            written with another checkpoint, threshold, format or program.
        OSError: the file cannot be written.
    """
    partial = unfinished_of(path)
    if not path.parent.is_dir():
        raise ResultsError(f"there is no folder {path.parent} for --out; make it, or name another")
    busy = ResultsError(
        f"another process is writing {partial}; wait for it to end, or name another file with --out"
    )
    _refuse_existing(path, output, resume)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(path.with_name(f".{path.name}.lock"), busy, remove=True))
        _refuse_existing(path, output, resume)  # again: another process may have finished
        is_new = not partial.exists()
        stream = partial.open("x+b" if is_new else "r+b", buffering=0)
        held.callback(stream.close)
        try:
            file = _opened(path, stream, output, checkpoint)
        except BaseException:
            if is_new:
                partial.unlink()
            raise
        file.held = held.pop_all()
        return file


def _refuse_existing(path: Path, output: str, resume: bool) -> None:
    for existing in (path, unfinished_of(path)):
        if existing.exists() and not existing.is_file():
            raise ResultsError(f"{existing} is not a regular file; name another with --out")
        if existing.exists() and not resume:
            remove = "remove it" if output == "table" else "--resume goes on with it"
            raise ResultsError(f"{existing} exists; {remove}, or name another file with --out")


def _opened(path: Path, stream: BinaryIO, output: str, checkpoint: str) -> ResultsFile:
    """Return the locked file `<path>.partial`, positioned after its last complete row."""
    partial = unfinished_of(path)
    time_of = _time_of(path, partial)
    with partial.open("rb") as started:
        if path.exists():
            with path.open("rb") as finished:
                rows = _read_rows(finished, output, path, checkpoint, may_be_cut=False)
                if not _begins_with(started, finished):
                    if not _begins_with(finished, started):
                        raise ResultsError(
                            f"{path} and {partial} are both there, and neither begins with the "
                            "other; remove or rename one, or name another file with --out"
                        )
                    until = _until(time_of, stream)
                    file = ResultsFile(path, stream, output, rows.names, rows.unreadable, until)
                    finished.seek(0)
                    for part in iter(lambda: finished.read(2**20), b""):
                        file.write_bytes(part)
                    return file
        rows = _read_rows(started, output, partial, checkpoint, may_be_cut=True)
    until = _until(time_of, stream)
    stream.truncate(rows.end)
    stream.seek(rows.end)
    file = ResultsFile(path, stream, output, rows.names, rows.unreadable, until)
    file.reach(until)  # `truncate` changed the file's time
    if not rows.end and output == "csv":
        file.write(header(output))
    return file


def _time_of(path: Path, partial: Path) -> int | None:
    """Return the modification time in ns of the longer file, or None if it is empty. If both are as
    long, that of the finished one: a kill while it is copied leaves the time of the copy.
    """
    facts = [place.stat() for place in (path, partial) if place.exists()]
    longer = max(facts, key=lambda fact: fact.st_size)  # the first of equal ones
    return longer.st_mtime_ns if longer.st_size else None


def _until(time_of: int | None, stream: BinaryIO) -> float:
    """Return the time up to which all changes are in the rows, by the time of their file in ns: a
    stamp has whole milliseconds. Return 0 for another time, which a copy has, or a write before a
    kill, and for one later than now: the clock was ahead. A disk may store no times: then the time
    of the last write counts.
    """
    if time_of is None:
        return time.time()
    until = time_of / 1e9
    is_stamp = time_of % 10**6 == 0 or not _stores_times(stream)
    return until if is_stamp and until <= time.time() + TICK_S else 0.0


def _stamp(stream: BinaryIO, until: float) -> None:
    """Set the modification time of a file to `until`, rounded to milliseconds."""
    nanoseconds = round(until * 1000) * 10**6
    with contextlib.suppress(OSError):  # not every network disk stores times
        os.utime(stream.fileno(), ns=(nanoseconds, nanoseconds))


def _stores_times(stream: BinaryIO) -> bool:
    """Return whether the disk of a file stores times. If it does, the file gets the time 0."""
    _stamp(stream, 0)
    return os.fstat(stream.fileno()).st_mtime < 1e9  # some disks begin in 1980


def _begins_with(longer: BinaryIO, shorter: BinaryIO) -> bool:
    """Return whether one file begins with all bytes of the other file."""
    longer.seek(0)
    shorter.seek(0)
    return all(longer.read(len(part)) == part for part in iter(lambda: shorter.read(2**20), b""))


_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


def _hash(name: str) -> np.uint64:
    data = as_utf8(name).encode()  # names are escaped in rows
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))


class _Rows(NamedTuple):
    """Content of a results file: sorted hashes of the names, number of rows without a verdict, and
    the byte offset at which the last complete row ends.
    """

    names: np.ndarray
    unreadable: int
    end: int


def _read_rows(
    stream: BinaryIO, output: str, path: Path, checkpoint: str, *, may_be_cut: bool
) -> _Rows:
    """Read a whole results file, and check that all rows are of this `checkpoint`.

    Raises:
        ResultsError: rows of another checkpoint or format, or the last row is incomplete although
            `may_be_cut` is off.
    """
    end = _end_of_rows(stream, output)
    stream.seek(end)
    cut = stream.read(4096)
    if cut and not (may_be_cut and _begins_a_row(cut, output, end == 0)):
        raise ResultsError(
            f"{path} does not end as a {output} file of this program does; name another file with "
            "--out"
        )
    hashes, unreadable = array("Q"), 0
    for row in _rows(stream, output, path, end):
        if row["checkpoint"] != checkpoint:
            raise ResultsError(
                f"{path} was made by {row['checkpoint']}, this is {checkpoint} (another "
                "checkpoint, calibration or threshold); name another file with --out"
            )
        hashes.append(int(_hash(row["path"])))
        unreadable += bool(row["error"])
    return _Rows(np.sort(np.frombuffer(hashes, np.uint64)), unreadable, end)


def _end_of_rows(stream: BinaryIO, output: str) -> int:
    """Return the byte offset at which the last complete row ends. In CSV, a name with a newline is
    in quotes.
    """
    end, offset, quotes = 0, 0, 0
    stream.seek(0)
    for part in stream:
        offset += len(part)
        quotes += part.count(b'"') if output == "csv" else 0
        if part.endswith(b"\n") and quotes % 2 == 0:
            end = offset
    return end


def _begins_a_row(cut: bytes, output: str, is_first: bool) -> bool:
    """Return whether bytes without a line end can be the beginning of a row; any bytes can in a CSV
    file after the header.
    """
    if output == "csv":
        return not is_first or header("csv").encode().startswith(cut)
    start = b'{"path": "'
    return cut.startswith(start) or start.startswith(cut)


def _rows(stream: BinaryIO, output: str, path: Path, end: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a results file up to the byte offset `end`, with the values as given to
    `line`.
    """
    largest = csv.field_size_limit()
    try:
        if output == "csv":
            csv.field_size_limit(sys.maxsize)  # names in archives may be very long
            reader = csv.DictReader(_texts(stream, end), strict=True)
            if end and tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"it begins with {reader.fieldnames}")
            for row in reader:
                if len(row) != len(COLUMNS) or None in row.values():
                    raise ValueError(f"line {reader.line_num} does not have {len(COLUMNS)} cells")
                yield {name: from_spreadsheet_cell(text) for name, text in row.items()}
        else:
            for row in map(parse_json, _texts(stream, end)):
                if not isinstance(row, dict) or tuple(row) != COLUMNS or not _has_texts(row):
                    raise ValueError(f"it contains the row {str(row)[:100]}")
                yield row
    except (ValueError, TypeError, csv.Error) as error:
        raise ResultsError(
            f"{path} is not a {output} file of this program ({error}); name another file with --out"
        ) from error
    finally:
        csv.field_size_limit(largest)


def _has_texts(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row[name], str) for name in ("path", "error", "checkpoint"))


def _texts(stream: BinaryIO, end: int) -> Iterator[str]:
    """Yield the lines of a file up to the byte offset `end`."""
    offset = 0
    stream.seek(0)
    while offset < end:
        part = stream.readline()
        offset += len(part)
        yield part.decode()
