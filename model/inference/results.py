"""Verdicts as lines: a table for people, CSV and JSON lines for programs; and the file that they
go to, which grows as they come and can be gone on with.
"""

import csv
import fcntl
import hashlib
import io
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from escape import from_spreadsheet_cell, printable, spreadsheet_cell
from storage import publish

COLUMNS = ("path", "probability", "verdict", "error", "provenance", "checkpoint")
"""What is said of an image, in this order: `probability` is that of AI-generated (of a checkpoint
that is not calibrated a score, under the same name), `error` why there is none, `provenance` the
evidence, `checkpoint` which model said it with which band.
"""

FORMATS = ("table", "csv", "jsonl")


def header(output: str, word: str = "probability") -> str:
    """What stands above the lines; empty for JSON lines. `word` says what a table's numbers are."""
    if output == "table":
        return f"{word:>11}  {'verdict':<13}  file"
    return ",".join(COLUMNS) if output == "csv" else ""


def line(output: str, row: Mapping[str, Any]) -> str:
    """One image in a format, without the last newline; `provenance` of `row` is a list of
    `Evidence`.
    """
    if output == "table":
        return _table_line(row)
    if output == "csv":
        stream = io.StringIO()
        values = {**row, "provenance": "; ".join(map(str, row["provenance"]))}
        cells = [spreadsheet_cell(v) if isinstance(v, str) else v for v in values.values()]
        # It quotes the newlines that are in its own line end, so both kinds must be.
        csv.writer(stream, lineterminator="\r\n").writerow(cells)
        return stream.getvalue().removesuffix("\r\n")
    values = {**row, "provenance": [asdict(evidence) for evidence in row["provenance"]]}
    text = json.dumps(values, ensure_ascii=False)
    # A name that is not UTF-8 is written with escapes, by which Python finds the file again.
    return text if _is_utf8(text) else json.dumps(values)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _table_line(row: Mapping[str, Any]) -> str:
    name = printable(row["path"]).replace("\n", "\\n")
    if row["error"]:
        return f"{'-':>11}  {row['verdict']:<13}  {name}: {row['error']}"
    lines = [f"{row['probability']:11.3f}  {row['verdict']:<13}  {name}"]
    lines += [f"{'':28}the file says: {evidence}" for evidence in row["provenance"]]
    return "\n".join(lines)


class ResultsError(ValueError):
    """A file that results cannot go to; the message says what to do."""


@dataclass(eq=False)
class ResultsFile:
    """The file that lines go to. It is called `<name>.partial` until `finish`, and locked for this
    process until `close`.

    `names` holds a hash of each name that is in it, sorted, `unreadable` how many of those rows
    have no verdict.
    """

    path: Path
    stream: BinaryIO
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    unreadable: int = 0

    def __contains__(self, name: str) -> bool:
        index = np.searchsorted(self.names, _hash(name))
        return bool(index < len(self.names) and self.names[index] == _hash(name))

    def write(self, text: str) -> None:
        """Add a line; it is in the file at once.

        Raises:
            OSError: the disk is full or gone; the message names the file.
        """
        self.write_bytes(text.encode("utf-8", "surrogateescape") + b"\n")

    def write_bytes(self, data: bytes) -> None:
        """Add bytes that are whole rows; raises as `write`."""
        left = memoryview(data)
        try:
            while left:  # a full disk takes a part, and fails at the next
                left = left[self.stream.write(left) :]
        except OSError as error:
            reason = f"{error.strerror}; its whole rows are kept, and --resume goes on with them"
            raise OSError(error.errno, reason, str(partial_of(self.path))) from error

    def finish(self) -> None:
        """Give the file its name."""
        publish(partial_of(self.path), self.path)

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self.stream.close()


def partial_of(path: Path) -> Path:
    """What a results file is called before it is finished."""
    return path.with_name(f"{path.name}.partial")


def open_results(path: Path, output: str, checkpoint: str, resume: bool) -> ResultsFile:
    """A results file to write to, new or (`resume`) with what is in it already.

    A finished file stays as it is until `finish` puts the longer one in its place. Nothing is
    changed before every row was read and found to be of this `checkpoint` and format.

    Raises:
        ResultsError: there is one already and it is not to be gone on with, it is written to by
            another process, or it is of another checkpoint, threshold, format or program.
        OSError: it cannot be written.
    """
    partial = partial_of(path)
    for existing in (path, partial):
        if existing.exists() and not existing.is_file():
            raise ResultsError(f"{existing} is no plain file; name another one with --out")
        if existing.exists() and not resume:
            raise ResultsError(
                f"{existing} exists; --resume goes on with it, or name another file with --out"
            )
    if not path.parent.is_dir():
        raise ResultsError(f"there is no folder {path.parent} for --out; make it, or name another")
    is_new = not partial.exists()
    stream = partial.open("x+b" if is_new else "r+b", buffering=0)
    try:
        _lock(stream, partial)
        return _opened(path, stream, output, checkpoint)
    except BaseException:
        if is_new:
            partial.unlink(missing_ok=True)
        stream.close()
        raise


def _lock(stream: BinaryIO, partial: Path) -> None:
    busy = ResultsError(
        f"another predict.py is writing {partial}; wait for it to end, or name another file "
        "with --out"
    )
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    if not partial.exists() or not os.path.samestat(os.fstat(stream.fileno()), partial.stat()):
        raise busy  # it was finished in this moment


def _opened(path: Path, stream: BinaryIO, output: str, checkpoint: str) -> ResultsFile:
    """The locked file `<path>.partial` with the rows that are kept, at its end."""
    partial = partial_of(path)
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
                    file = ResultsFile(path, stream, rows.names, rows.unreadable)
                    finished.seek(0)
                    for part in iter(lambda: finished.read(2**20), b""):
                        file.write_bytes(part)
                    return file
        rows = _read_rows(started, output, partial, checkpoint, may_be_cut=True)
    stream.truncate(rows.end)
    stream.seek(rows.end)
    file = ResultsFile(path, stream, rows.names, rows.unreadable)
    if not rows.end and output == "csv":
        file.write(header(output))
    return file


def _begins_with(longer: BinaryIO, shorter: BinaryIO) -> bool:
    """Whether the bytes of a file begin with all of those of another."""
    longer.seek(0)
    shorter.seek(0)
    return all(longer.read(len(part)) == part for part in iter(lambda: shorter.read(2**20), b""))


def _hash(name: str) -> np.uint64:
    data = name.encode("utf-8", "surrogateescape")
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))


class _Rows(NamedTuple):
    """What is in a results file: a sorted hash of each name, how many rows have no verdict, and
    where its last whole row ends.
    """

    names: np.ndarray
    unreadable: int
    end: int


def _read_rows(
    stream: BinaryIO, output: str, path: Path, checkpoint: str, *, may_be_cut: bool
) -> _Rows:
    """Read a whole results file, and check that it is one of this `checkpoint`.

    Raises:
        ResultsError: it is not, or it ends within a row and must not.
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
    """Where the last whole row ends. A name may hold a newline, which in CSV stands in quotes."""
    end, offset, quotes = 0, 0, 0
    stream.seek(0)
    for part in stream:
        offset += len(part)
        quotes += part.count(b'"') if output == "csv" else 0
        if part.endswith(b"\n") and quotes % 2 == 0:
            end = offset
    return end


def _begins_a_row(cut: bytes, output: str, is_first: bool) -> bool:
    """Whether bytes without a line end may be the beginning of a row; of a CSV file that has its
    header any may.
    """
    if output == "csv":
        return not is_first or header("csv").encode().startswith(cut)
    start = b'{"path": "'
    return cut.startswith(start) or start.startswith(cut)


def _rows(stream: BinaryIO, output: str, path: Path, end: int) -> Iterator[dict[str, Any]]:
    """The rows of a results file up to the byte `end`, with the texts that `line` was given."""
    try:
        if output == "csv":
            reader = csv.DictReader(_texts(stream, end), strict=True)
            if end and tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"it begins with {reader.fieldnames}")
            for row in reader:
                if len(row) != len(COLUMNS) or None in row.values():
                    raise ValueError(f"line {reader.line_num} has not {len(COLUMNS)} cells")
                yield {name: from_spreadsheet_cell(text) for name, text in row.items()}
        else:
            for row in map(json.loads, _texts(stream, end)):
                if not isinstance(row, dict) or tuple(row) != COLUMNS:
                    raise ValueError(f"it has a row {str(row)[:100]}")
                yield row
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ResultsError(
            f"{path} is no {output} file of this program ({error}); name another file with --out"
        ) from error


def _texts(stream: BinaryIO, end: int) -> Iterator[str]:
    """The lines of a file up to the byte `end`."""
    offset = 0
    stream.seek(0)
    while offset < end:
        part = stream.readline()
        offset += len(part)
        yield part.decode("utf-8", "surrogateescape")
