"""Run a detector over many images: read each image once, score it, and write one line of results.

Main entries: `predict_all(run, paths, batch_size)` scores all images of the paths and shows the
progress. `predict_as_they_come(run, folder, batch_size)` scores the images of a folder, and then
new ones as they appear, without end.

- `run`: a `PredictionRun(detector, output, out, heatmaps, trust)`, see below.
- `paths`: a tuple of texts: images, folders, archives, patterns, or `-` for a list on standard
  input.
- `folder`: the path of the folder as text.
- `batch_size`: the largest number of images in a batch; the first batches are smaller.

A `PredictionRun` takes:

- `detector`: a loaded detector, such as that of `load_detector()`,
- `output`: the format of the lines, "table", "csv" or "jsonl"; if `out` is given, the same as was
  given to `open_results()`,
- `out`: a `ResultsFile` from `open_results()` of `model/inference/results.py`, which the caller
  finishes and closes; None (the default) for standard output, without a header,
- `heatmaps`: `Path` of the folder for heatmaps (made if missing), for an `ImageDetector` only; None
  (the default) for no heatmaps,
- `trust`: the `TrustList` of C2PA signers; None (the default): no signer is trusted.

`predict_all()` returns nothing; `predict_as_they_come()` never returns. An unreadable image, or a
path that does not exist, gets a line with the reason. A `folder` that does not exist is waited for.
`OSError` is raised if a result or a heatmap cannot be written (a full disk; a bad file name only
counts in `undrawn`), and `ExplainError` if a heatmap cannot be computed. Errors of the detector
pass through. The `PredictionRun` counts:

- `verdicts`: images by verdict.
- `excluded`: files left out, by reason (of `predict_as_they_come()`: in its last scan).
- `skipped`: images already in the results file.
- `undrawn`: heatmaps that could not be written because the image's name is not possible as a file
  name. This is logged as a warning, and raises no error.
- `escaped`: images of which the name is not UTF-8. Their lines have it with escapes (`as_utf8`).

`draw_heatmap(detector, name, data, folder)` takes the name and the bytes of an image, and writes
its heatmap to `heatmap_path(name, folder)`, a PNG below `folder`. `read_paths(paths)` yields these
paths, and instead of `-` the lines of standard input. `count_in_background(paths, counted)` counts
the images in a thread and then appends their number to the list `counted`; it appends nothing if
`-` or a compressed archive is among the paths. A `PredictionRun` uses `Note` for what it knows of
an image before its line is written; callers do not need it.
"""

import contextlib
import errno
import hashlib
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePath

import console
from escape import as_utf8, one_line
from imaging.decode import DecodeError, ImageFile
from model.c2pa.signatures import TrustList
from model.inference import inputs, results
from model.inference.prediction import AnyDetector, Prediction, group_sizes
from model.inference.provenance import Evidence, read_evidence
from storage import file_name, write_atomically


@dataclass(eq=False)
class Note:
    """Facts about an image other than its score; set when its bytes are read."""

    provenance: list[Evidence] = field(default_factory=list)
    data: bytes = b""  # empty unless heatmaps are requested
    is_written: bool = False  # in the results; scored again to complete a batch


@dataclass(eq=False)
class PredictionRun:
    """State of one run over images: destination of the results, and counts so far."""

    detector: AnyDetector
    output: str
    out: results.ResultsFile | None = None
    heatmaps: Path | None = None
    trust: TrustList | None = None
    verdicts: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    watched: set[str] | None = None  # names so far, of a watched folder
    skipped: int = 0  # images already in the results file
    undrawn: int = 0  # heatmaps that could not be written
    escaped: int = 0  # images whose name is not UTF-8
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Number of images written in this run."""
        return self.verdicts.total()

    @property
    def rate(self) -> str:
        """Average speed so far, as text."""
        return f"{self.done / max(time.monotonic() - self.started, 1e-9):,.1f} images/s"

    def over(self, files: Iterable[ImageFile], batch_size: int) -> Iterator[int]:
        """Score `files` and write a line for each. Yields the number of processed images.

        Images that are in the results file already are skipped in whole batches. So a resumed run
        has the same batches, and to the last bit the same probabilities, as an uninterrupted run.
        """
        remaining, start = yield from self._remaining(files, batch_size)
        first = next(group_sizes(batch_size, start))
        notes: deque[Note] = deque()

        def reading() -> Iterator[ImageFile]:
            for index, (file, is_written) in enumerate(remaining):
                # Score all images of the first batch again, because rounding depends on the batch
                # size.
                if is_written and (index >= first or self.heatmaps):
                    file = self._pass_over(file)
                if not is_written or index < first:
                    notes.append(Note(is_written=is_written))
                    yield self._noted(file, notes[-1])
                self.skipped += is_written

        with contextlib.closing(self.detector.stream(reading(), batch_size, start)) as predictions:
            for result in predictions:
                note = notes.popleft()
                if not note.is_written:
                    self._write(result, note)
                yield self.done + self.skipped

    def _is_written(self, file: ImageFile) -> bool:
        """Return whether the results file had a line for this image when the run began. Call it
        once per image: each of several images of one name has its own line. In a watched folder,
        the line of an image that has changed since then does not count.
        """
        if not self.out:
            return False
        if self.watched is None:
            return self.out.take(file.name)
        if file.name not in self.out:
            return False
        is_first = file.name not in self.watched
        self.watched.add(file.name)
        return is_first and not self.out.is_older_than(file.name)

    def _pass_over(self, file: ImageFile) -> ImageFile:
        """Draw the heatmap of an image that is in the results file, if it is requested and missing.
        Return the same image, which can still be read.
        """
        if not self.heatmaps or heatmap_path(file.name, self.heatmaps).exists():
            file.skip()
            return file
        try:
            data = file.read()
        except (DecodeError, OSError):  # the results have the reason
            return file
        with contextlib.suppress(DecodeError):
            self._draw(file.name, data, self.heatmaps)
        return ImageFile(file.name, lambda: data)

    def _remaining(
        self, files: Iterable[ImageFile], batch_size: int
    ) -> Generator[int, None, tuple[Iterator[tuple[ImageFile, bool]], int]]:
        """Return the files from the first incomplete batch on, each with `_is_written` of it, and
        the number of files before them. Yields the number of processed images, as `over` does.
        """
        states = ((file, self._is_written(file)) for file in files)
        start = 0
        if self.watched is not None or not self.out or not len(self.out.names):
            return states, start
        for size in group_sizes(batch_size):
            group = []
            is_complete = True
            for file, is_written in islice(states, size):
                is_complete &= is_written
                if not is_written:
                    file.skip()
                group.append((self._pass_over(file) if is_written else file, is_written))
            if not group or not is_complete:
                return chain(group, states), start
            start += size
            self.skipped += len(group)
            yield self.done + self.skipped
        raise AssertionError("group_sizes has no end")

    def _noted(self, file: ImageFile, note: Note) -> ImageFile:
        """Return the same image; reading it also stores its provenance in `note`."""

        def read() -> bytes:
            data = file.read()
            note.provenance = read_evidence(data, self.trust)
            note.data = data if self.heatmaps else b""
            return data

        return ImageFile(file.name, read)

    def _write(self, result: Prediction, note: Note) -> None:
        self.verdicts[result.verdict] += 1
        self.escaped += as_utf8(result.name) != result.name
        row = results.row(
            path=result.name,
            probability=result.probability,
            verdict=result.verdict,
            error=result.error,
            provenance=note.provenance,
            checkpoint=self.detector.identity,
        )
        text = results.line(self.output, row)
        if self.heatmaps and not result.error:
            self._draw(result.name, note.data, self.heatmaps)
        if self.out:
            self.out.write(text)
        elif self.output == "table":
            console.say(text)
        else:
            console.say_data(text)

    def _draw(self, name: str, data: bytes, folder: Path) -> None:
        """Write one heatmap. If the image's name is not possible as a file name, log a warning and
        count it in `undrawn`; the run continues.
        """
        try:
            draw_heatmap(self.detector, name, data, folder)
        except OSError as error:
            if error.errno not in _OF_ONE_NAME:
                raise
            self.undrawn += 1
            console.log.warning("no heatmap of %s: %s", name, one_line(error))


# Errors caused by a single name. Any other error, such as a full disk, ends the run.
_OF_ONE_NAME = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ)


def draw_heatmap(detector: AnyDetector, name: str, data: bytes, folder: Path) -> None:
    """Write the heatmap of an image to `heatmap_path`, atomically."""
    from PIL import Image

    from model.inference.detector import ImageDetector
    from model.inference.gradcam import heatmap

    assert isinstance(detector, ImageDetector)  # `predict.py` checks this
    path = heatmap_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(heatmap(detector, data))
    write_atomically(path, lambda partial: picture.save(partial, "PNG"))


def heatmap_path(name: str, folder: Path) -> Path:
    """Return `<folder>/<path of the image>.png`. If a root or `..` is removed from the path, a hash
    of the path is added to the name, because another image may have the rest as its path. A name
    that is too long for a file is shortened to its beginning and a hash.
    """
    path = PurePath(name)
    parts = [part for part in path.parts if part not in (path.anchor, "..")]
    left_out = len(parts) < len(path.parts)
    mark = f"-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}" if left_out else ""
    return folder.joinpath(*parts[:-1], file_name(f"{path.name}{mark}", ".png"))


def read_paths(paths: Iterable[str]) -> Iterator[str]:
    """Yield `paths`, with `-` replaced by the lines of standard input, read as they arrive."""
    for path in paths:
        if path == "-":
            lines = map(os.fsdecode, sys.stdin.buffer)
            yield from filter(None, (text.rstrip("\r\n") for text in lines))
        else:
            yield path


def count_in_background(paths: tuple[str, ...], counted: list[int]) -> None:
    """Count the images in a thread and append the number to `counted`. Appends nothing if the paths
    include a list on standard input, or a compressed archive, which would have to be unpacked.
    """

    def count() -> None:
        total = 0
        with contextlib.suppress(Exception):  # the run itself reports errors
            for file in inputs.find_images(paths, Counter()):
                if file.is_held:
                    return
                total += 1
            counted.append(total)

    if "-" not in paths:
        threading.Thread(target=count, daemon=True).start()


def predict_all(run: PredictionRun, paths: tuple[str, ...], batch_size: int) -> None:
    """Score the images of `paths`, with a progress bar."""
    counted: list[int] = []
    if run.out and (rows := len(run.out.names)):
        written = console.counted(rows, "row")
        console.log.info("%s written before; looking for the first new image", written)
    with console.progress("predicting", None) as advance:
        if console.ERR.is_terminal:
            count_in_background(paths, counted)
        behind = 0
        files = inputs.find_images(read_paths(paths), run.excluded)
        for count in run.over(files, batch_size):
            advance(count - behind, run.rate, *counted)
            behind = count


def predict_as_they_come(run: PredictionRun, folder: str, batch_size: int) -> None:
    """Score new images in a folder, without end."""
    console.log.info("watching %s; press Ctrl-C to stop", folder)
    if run.out and not run.out.until:
        console.log.warning(
            "the time of %s is not one that this program gave it (a copy, a changed clock, a "
            "kill): all images are scored again", run.out.path,
        )  # fmt: skip
    run.watched = set()
    for ready, until in inputs.watch(folder, run.excluded):
        for _ in run.over(ready, batch_size):
            pass
        if run.out and ready:
            run.out.reach(until)
