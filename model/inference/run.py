"""One run of a detector over images: each is read once, scored, and written as a line.

What takes seconds to load (torch, timm) is imported inside the functions that use it.
"""

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import click

import console
from imaging.decode import ImageFile
from model.inference import inputs, results
from model.inference.provenance import Evidence, read_evidence

if TYPE_CHECKING:
    from model.inference.detector import ImageDetector
    from model.inference.onnx_detector import OnnxDetector
    from model.inference.prediction import Prediction


@dataclass(eq=False)
class Note:
    """What is known of an image beside its score; filled when its bytes are read."""

    provenance: list[Evidence] = field(default_factory=list)
    data: bytes = b""  # kept only where a heatmap is wanted


@dataclass(eq=False)
class Run:
    """One run over images: where results go, and what has been counted."""

    detector: "ImageDetector | OnnxDetector"
    output: str
    out: results.ResultsFile | None = None
    heatmaps: Path | None = None
    verdicts: Counter[str] = field(default_factory=Counter)
    excluded: Counter[str] = field(default_factory=Counter)
    skipped: int = 0  # they are in the results file already
    started: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Images that have a line."""
        return self.verdicts.total()

    @property
    def rate(self) -> str:
        """The speed so far."""
        return f"{self.done / max(time.monotonic() - self.started, 1e-9):,.1f} images/s"

    def over(self, files: Iterable[ImageFile], batch_size: int) -> Iterator[int]:
        """Score `files` and write a line for each; yields how many images are behind us."""
        notes: deque[Note] = deque()

        def reading() -> Iterator[ImageFile]:
            for file in files:
                if self.out and file.name in self.out:
                    self.skipped += 1
                else:
                    notes.append(Note())
                    yield self._noted(file, notes[-1])

        with contextlib.closing(self.detector.predict(reading(), batch_size)) as predictions:
            for result in predictions:
                self._write(result, notes.popleft())
                yield self.done + self.skipped

    def _noted(self, file: ImageFile, note: Note) -> ImageFile:
        """The same image; when it is read, what it says of itself is noted beside it."""

        def read() -> bytes:
            data = file.read()
            note.provenance = read_evidence(data)
            note.data = data if self.heatmaps else b""
            return data

        return ImageFile(file.name, read)

    def _write(self, result: "Prediction", note: Note) -> None:
        self.verdicts[result.verdict] += 1
        values = (
            result.name, result.probability, result.verdict, result.error, note.provenance,
            self.detector.identity,
        )  # fmt: skip
        text = results.line(self.output, dict(zip(results.COLUMNS, values, strict=True)))
        if self.heatmaps and not result.error:
            draw_heatmap(self.detector, result.name, note.data, self.heatmaps)
        if self.out:
            self.out.write(text)
        elif self.output == "table":
            console.say(text)
        else:
            console.say_data(text)


def draw_heatmap(detector: "ImageDetector", name: str, data: bytes, folder: Path) -> None:
    """Write the overlay of an image to `<folder>/<its path>.png`."""
    from PIL import Image

    from model.inference.gradcam import heatmap

    parts = [part for part in PurePath(name).parts if part not in (PurePath(name).anchor, "..")]
    path = folder.joinpath(*parts)
    path = path.with_name(f"{path.name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(heatmap(detector, data)).save(path)


def named(paths: Iterable[str]) -> Iterator[str]:
    """PATH... with `-` replaced by the list on standard input, as it comes."""
    for path in paths:
        if path == "-":
            lines = click.get_text_stream("stdin", errors="surrogateescape")
            yield from filter(None, (text.rstrip("\r\n") for text in lines))
        else:
            yield path


def count_in_background(paths: tuple[str, ...], counted: list[int]) -> None:
    """Put the number of images into `counted` once it is known; never, for a list on standard input
    or an archive that would have to be unpacked for it.
    """

    def count() -> None:
        with contextlib.suppress(Exception):  # the run itself says what is wrong
            counted.append(sum(1 for _ in inputs.find_images(paths, Counter())))

    if "-" not in paths and not any(map(inputs.is_compressed, paths)):
        threading.Thread(target=count, daemon=True).start()


def predict_all(run: Run, paths: tuple[str, ...], batch_size: int) -> None:
    """Score the images of `paths`, with a progress bar."""
    counted: list[int] = []
    with console.progress("predicting", None) as advance:
        if console.ERR.is_terminal:
            count_in_background(paths, counted)
        behind = 0
        files = inputs.find_images(named(paths), run.excluded)
        for count in run.over(files, batch_size):
            advance(count - behind, run.rate, *counted)
            behind = count


def predict_as_they_come(run: Run, folder: str, batch_size: int) -> None:
    """Score what comes into a folder, without end."""
    console.log.info("watching %s; Ctrl-C ends", folder)
    for ready in inputs.watch(folder, run.excluded):
        for _ in run.over(ready, batch_size):
            pass
