"""Verdicts as lines: a table for people, CSV and JSON lines for programs; and the file that they
go to, which grows as they come and can be gone on with.
"""

import csv
import hashlib
import io
import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from storage import publish

COLUMNS = ("path", "probability", "verdict", "error", "provenance", "checkpoint")
"""What is said of an image, in this order: `probability` is that of AI-generated, `error` why there
is none, `provenance` the evidence, `checkpoint` which model said it with which band.
"""

FORMATS = ("table", "csv", "jsonl")


def header(output: str) -> str:
    """What stands above the lines; empty for two of the formats."""
    return ",".join(COLUMNS) if output == "csv" else ""


def line(output: str, row: Mapping[str, Any]) -> str:
    """One image in a format, without the last newline; `provenance` of `row` is a list of
    `Evidence`.
    """
    if output == "table":
        return _table_line(row)
    if output == "csv":
        stream = io.StringIO()
        said = "; ".join(map(str, row["provenance"]))
        # It quotes the newlines that are in its own line end, so both kinds must be.
        csv.writer(stream, lineterminator="\r\n").writerow({**row, "provenance": said}.values())
        return stream.getvalue().removesuffix("\r\n")
    values = {**row, "provenance": [asdict(one) for one in row["provenance"]]}
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
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in row["path"])
    if row["error"]:
        return f"    -  {row['verdict']:<11}  {name}: {row['error']}"
    lines = [f"{row['probability']:5.3f}  {row['verdict']:<11}  {name}"]
    lines += [f"{'':20}the file says: {one}" for one in row["provenance"]]
    return "\n".join(lines)


class ResultsError(ValueError):
    """A file that results cannot go to; the message says what to do."""


@dataclass(eq=False)
class ResultsFile:
    """The file that lines go to. It is called `<name>.partial` until `finish`.

    `names` holds a hash of each name that is in it, sorted, `unreadable` how many of those rows
    have no verdict.
    """

    path: Path
    stream: BinaryIO
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    unreadable: int = 0

    def __contains__(self, name: str) -> bool:
        place = np.searchsorted(self.names, _hash(name))
        return bool(place < len(self.names) and self.names[place] == _hash(name))

    def write(self, text: str) -> None:
        """Add a line; it is in the file at once."""
        self.stream.write(text.encode("utf-8", "surrogateescape") + b"\n")

    def finish(self) -> None:
        """Give the file its name."""
        self.stream.close()
        publish(partial_of(self.path), self.path)


def partial_of(path: Path) -> Path:
    """What a results file is called before it is finished."""
    return path.with_name(f"{path.name}.partial")


def open_results(path: Path, output: str, checkpoint: str, resume: bool) -> ResultsFile:
    """A results file to write to, new or (`resume`) with what is in it already.

    Raises:
        ResultsError: there is one already and it is not to be gone on with, or it is of another
            checkpoint, threshold or format.
    """
    partial = partial_of(path)
    for existing in (path, partial):
        if existing.exists() and not resume:
            raise ResultsError(
                f"{existing} exists; --resume goes on with it, or name another file with --out"
            )
    if resume and path.exists() and not partial.exists():
        path.rename(partial)
    if partial.exists():
        with partial.open("r+b") as stream:
            stream.truncate(_whole_rows(stream, output))  # the last one may be cut off
    if not partial.exists() or not partial.stat().st_size:
        file = ResultsFile(path, partial.open("wb", buffering=0))
        if output == "csv":
            file.write(header(output))
        return file
    hashes, unreadable = array("Q"), 0
    with partial.open("rb") as stream:
        for row in _rows(stream, output, partial):
            if row["checkpoint"] != checkpoint:
                raise ResultsError(
                    f"{partial} was made by {row['checkpoint']}, this is {checkpoint} (another "
                    "checkpoint, calibration or threshold); name another file with --out"
                )
            hashes.append(int(_hash(row["path"])))
            unreadable += bool(row["error"])
    names = np.sort(np.frombuffer(hashes, np.uint64))
    return ResultsFile(path, partial.open("ab", buffering=0), names, unreadable)


def _hash(name: str) -> np.uint64:
    data = name.encode("utf-8", "surrogateescape")
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))


def _whole_rows(stream: BinaryIO, output: str) -> int:
    """Where the last whole row ends. A name may hold a newline, which in CSV stands in quotes."""
    end, place, quotes = 0, 0, 0
    for part in stream:
        place += len(part)
        quotes += part.count(b'"') if output == "csv" else 0
        if part.endswith(b"\n") and quotes % 2 == 0:
            end = place
    return end


def _rows(stream: BinaryIO, output: str, path: Path) -> Iterator[dict[str, Any]]:
    text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
    try:
        if output == "csv":
            reader = csv.DictReader(text)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"it begins with {reader.fieldnames}")
            yield from reader
        else:
            for row in map(json.loads, text):
                if tuple(row) != COLUMNS:
                    raise ValueError(f"it has a row with {', '.join(row)}")
                yield row
    except (ValueError, TypeError, csv.Error) as error:
        raise ResultsError(
            f"{path} is no {output} file of this program ({error}); name another one with --out"
        ) from error
    finally:
        text.detach()
