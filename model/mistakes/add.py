"""Score images whose true label a person gives, and record each wrong verdict in a local folder.

Main entry: `keep_wrong(detector, paths, label, folder, *, keep_image)`, a generator.

- `detector`: a loaded detector, as `load_detector()` in `model/inference/detector.py` returns.
- `paths`: an iterable of texts: image files, folders, ZIP or TAR archives, or patterns such as
  `a/*.jpg`. It may be endless, such as the lines of a pipe.
- `label`: the true label of all these images, "real" or "fake".
- `folder`: a `Path`, the folder of the records (made if missing).
- `keep_image`: whether to store a copy of each recorded image in `folder`, too (bool).

It yields a `Reported` for every image, whatever the verdict: `text` (one line) and `failed` (bool).
It is true if the image could not be read, or if its record is damaged or above a limit of `keep.py`
(such as too many records); the next images are still scored. A path that does not exist, or a
pattern without a match, counts as an image that cannot be read. Nothing happens until the result is
iterated. If a file of `folder` cannot be read or written, `OSError` is raised and ends the
generator. Errors of the detector pass through.

A verdict is wrong if it is the opposite of `label`; "uncertain" is not wrong. A wrong verdict is
written to `folder/<SHA-256 of the image>.json`. Later verdicts on the same image are added to this
record, also right ones; it is deleted once none of its verdicts is wrong (see `keep.py`).

`AT_ONCE` is the number of images that are scored at a time.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imaging.decode import ImageFile
from model.inference.inputs import find_images
from model.mistakes.keep import Label, MistakeError, keep_mistake, room_in, verdict_of
from model.verdict import percent

if TYPE_CHECKING:
    from model.inference.prediction import AnyDetector

AT_ONCE = 8
"""Images scored at a time. The bytes of twice as many images are in memory."""


@dataclass(frozen=True)
class Reported:
    """Result for one image: a line of text, and whether reading or keeping the image failed."""

    text: str
    failed: bool


def keep_wrong(
    detector: "AnyDetector", paths: Iterable[str], label: Label, folder: Path, *, keep_image: bool
) -> Iterator[Reported]:
    """Score the images of `paths`, which all have the true label `label`. Yield a result for each.

    Raises:
        OSError: the folder cannot be written.
    """
    waiting: deque[list[bytes]] = deque()
    room = room_in(folder)

    def reading() -> Iterator[ImageFile]:
        for file in find_images(paths, Counter()):
            waiting.append([])
            yield _noted(file, waiting[-1])

    with closing(detector.stream(reading(), AT_ONCE)) as predictions:
        for result in predictions:
            read = waiting.popleft()
            if result.probability is None:
                yield Reported(f"{result.name}: {result.error}", failed=True)
                continue
            given = verdict_of(detector, result.probability)
            said = f"{result.name}: {given.verdict} ({percent(given.score)})"
            name = result.name if keep_image else None
            try:
                kept = keep_mistake(folder, read[0], label, given, copy_named=name, room=room)
            except MistakeError as error:
                yield Reported(f"{said}; not kept: {error}", failed=True)
                continue
            room -= kept.added
            yield Reported(f"{said}; {kept.text}", failed=False)


def _noted(file: ImageFile, read: list[bytes]) -> ImageFile:
    """Return an image file that also stores its bytes in the list `read` when it is read."""

    def read_and_note() -> bytes:
        read[:] = [file.read()]
        return read[0]

    return ImageFile(file.name, read_and_note)
