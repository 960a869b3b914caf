"""Tests of mistakes: valid entries and limits, failed writing, and the order of the outcomes."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from imaging.decode import MAX_BYTES
from model.inference.prediction import DecisionRule, Prediction
from model.mistakes import keep
from model.mistakes.add import keep_wrong
from model.mistakes.gate import read_start
from model.mistakes.keep import (
    MistakeError,
    Verdict,
    keep_mistake,
    read_mistake,
    read_mistakes,
    verdict_of,
)
from model.mistakes.regressions import measure_again
from model.verdict import VERDICTS
from tests.builders import encode, photo

NO_SIGN, UNCERTAIN, LIKELY = VERDICTS
IMAGES = [encode(photo(seed)) for seed in range(4)]
HASHES = [hashlib.sha256(image).hexdigest() for image in IMAGES]


def said(verdict: str, detector: str = "a", score: float = 0.9) -> Verdict:
    return Verdict(
        detector=detector, score=score, verdict=verdict, band=(0.4, 0.6), date="2026"
    )  # fmt: skip


class Rule(DecisionRule):
    """Detector with the band 0.3 to 0.7 that gives each image its score in `scores`."""

    def __init__(self, scores: dict[bytes, float] | None = None) -> None:
        self.checkpoint, self.asked, self.scores = Path("runs/x/step_1"), None, scores or {}
        self.meta = {"threshold": 0.7, "calibration": {"band": [0.3, 0.7]}}

    def stream(self, images: Iterator, _batch_size: int = 32) -> Iterator[Prediction]:
        """Read all images before the first prediction, as the threads of a real detector may."""
        for image, data in [(image, image.read()) for image in images]:
            score = self.scores.get(data)
            yield Prediction(
                name=image.name, probability=score, verdict="", error="" if score else "no image"
            )


def test_a_verdict_has_the_band_of_its_detector_and_the_time_in_utc() -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    given = verdict_of(Rule(), 0.5)
    assert (given.verdict, given.band, given.detector) == (UNCERTAIN, (0.3, 0.7), Rule().identity)
    assert given.date.endswith("+00:00")
    assert before <= datetime.fromisoformat(given.date) <= datetime.now(UTC)


@pytest.mark.parametrize("name", ["mine.json", "mine.exe", "mine"])
def test_a_copy_never_gets_a_suffix_that_is_no_image(tmp_path: Path, name: str) -> None:
    """The suffix `.json` would overwrite the entry."""
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY), copy_named=name)
    (mistake,) = read_mistakes(tmp_path)
    assert mistake.image == ".img"
    assert (tmp_path / f"{HASHES[0]}.img").read_bytes() == IMAGES[0]


def test_a_failed_write_keeps_the_old_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY))
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def fails(*_arguments: object, **_options: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(Path, "replace", fails)
    monkeypatch.setattr(os, "rename", fails)
    for name in (None, "a.jpg"):
        with pytest.raises(OSError, match="the disk is gone"):
            keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY, "b"), copy_named=name)
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == before


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY))
    for name in ("notes.json", f"{HASHES[0].upper()}.json", f"{HASHES[0]}.json.1.partial"):
        (tmp_path / name).write_text("mine")
    assert [mistake.sha256 for mistake in read_mistakes(tmp_path)] == [HASHES[0]]


def test_limits_hold_for_reading_a_folder_and_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for image in IMAGES[:2]:
        keep_mistake(tmp_path, image, "real", said(LIKELY))
    path = tmp_path / f"{HASHES[0]}.json"
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY, "b"))
    with monkeypatch.context() as patched:
        patched.setattr(keep, "MAX_MISTAKES", 1)
        with pytest.raises(MistakeError, match="has 2 mistakes, at most 1 are read"):
            read_mistakes(tmp_path)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"verdicts": entry["verdicts"] * 101}))
    with pytest.raises(MistakeError, match="verdicts takes a length of at most 200, got 202"):
        read_mistake(path)
    path.write_text(json.dumps(entry))
    with monkeypatch.context() as patched:
        patched.setattr(keep, "MAX_ENTRY_BYTES", 100)
        with pytest.raises(MistakeError, match=r"more than the limit of 100\); remove it"):
            read_mistake(path)
        before = path.read_bytes()
        patched.setattr(keep, "MAX_ENTRY_BYTES", len(before) + 1)
        with pytest.raises(MistakeError, match=r"an entry of .* bytes; the limit is"):
            keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY, "c"))
        assert path.read_bytes() == before


def test_many_mistakes_are_kept_up_to_the_limit_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting the folder for each image would take longer with each."""
    folder, listed = tmp_path / "kept", []
    keep_mistake(folder, IMAGES[0], "real", said(LIKELY))
    for index, image in enumerate((*IMAGES, IMAGES[1])):
        (tmp_path / f"{index}.jpg").write_bytes(image)
    list_entries = keep.entries_of
    monkeypatch.setattr(keep, "entries_of", lambda of: listed.append(of) or list_entries(of))
    monkeypatch.setattr(keep, "MAX_MISTAKES", 3)
    rule = Rule(dict.fromkeys(IMAGES, 0.9))
    paths = [str(tmp_path / f"{index}.jpg") for index in range(5)]
    reports = list(keep_wrong(rule, paths, "real", folder, keep_image=False))
    assert listed == [folder]
    assert [report.failed for report in reports] == [False, False, False, True, False]
    assert "has 3 mistakes, which is the limit" in reports[3].text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"score": float("nan")}, "score takes a number from 0 to 1, got NaN"),
        ({"score": 10**200}, r"score takes a number from 0 to 1, got 10+ \.\.\. 0+"),
        ({"score": True}, "score takes a number from 0 to 1, got true"),
        ({"band": [0.1, float("inf")]}, r"band\.1 takes a number from 0 to 1, got Infinity"),
        ({"band": [0.6, 0.1]}, "band takes two numbers from 0 to 1, the lower one first"),
        ({"band": [0.1]}, "band has 1 values, which is too few"),
        ({"verdict": "likely real"}, "verdict takes .* or 'likely AI', got \"likely real\""),
        ({"verdict": []}, "verdict takes a text, got "),
        ({"detector": 7}, "detector takes a text, got 7"),
        ({"date": None}, "date takes a text, got null"),
    ],
)
def test_an_invalid_verdict_is_refused(tmp_path: Path, change: dict, fault: str) -> None:
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY))
    path = tmp_path / f"{HASHES[0]}.json"
    entry = json.loads(path.read_text())
    entry["verdicts"][0] |= change
    path.write_text(json.dumps(entry))
    with pytest.raises(MistakeError, match=rf"is no entry of a mistake \(.*{fault}.*; remove it"):
        read_mistake(path)


def test_a_key_of_a_person_in_an_entry_is_ignored(tmp_path: Path) -> None:
    keep_mistake(tmp_path, IMAGES[0], "real", said(LIKELY))
    path = tmp_path / f"{HASHES[0]}.json"
    mistake = read_mistake(path)
    entry = json.loads(path.read_text()) | {"note": "mine"}
    entry["verdicts"][0]["note"] = "mine"
    path.write_text(json.dumps(entry))
    assert read_mistake(path) == mistake


def test_verdicts_of_the_initial_detector_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "start.json"
    file.write_text(json.dumps({HASHES[0]: asdict(said(LIKELY))}))
    assert read_start(file) == {HASHES[0]: said(LIKELY)}
    file.write_text(json.dumps({HASHES[0]: asdict(said(LIKELY)) | {"score": 10**200}}))
    with pytest.raises(MistakeError, match=r"\.score takes a number from 0 to 1, got 1.*restore"):
        read_start(file)


def test_the_worst_outcome_is_first_and_before_is_the_last_verdict(tmp_path: Path) -> None:
    """There is one mistake of each outcome."""
    images = [*IMAGES, b"not kept"]
    for index, image in enumerate(images):
        name = "a.jpg" if image in IMAGES else None
        keep_mistake(tmp_path, image, "real", said(LIKELY, "first", 0.91), copy_named=name)
        last = NO_SIGN if index == 3 else LIKELY
        keep_mistake(tmp_path, image, "real", said(last, "second", 0.92))
    scores = dict(zip(IMAGES, (0.1, 0.5, 0.9, 0.8), strict=True))
    done: list[int] = []
    rows = measure_again(
        tmp_path, read_mistakes(tmp_path), Rule(scores), advance=lambda: done.append(1),
        lacking="no copy here",
    )  # fmt: skip
    assert [row.outcome for row in rows] == [
        "newly wrong", "still wrong", "uncertain", "fixed", "not measurable",
    ]  # fmt: skip
    assert [row.mistake.sha256 for row in rows[:4]] == [HASHES[i] for i in (3, 2, 1, 0)]
    assert {row.before.detector for row in rows} == {"second"}
    assert rows[4].reason == "no copy here" and rows[4].after is None
    assert len(done) == 4


def test_unreadable_files_in_the_searched_folder_are_skipped(tmp_path: Path) -> None:
    folder, images = tmp_path / "kept", tmp_path / "images"
    keep_mistake(folder, IMAGES[0], "real", said(LIKELY))
    images.mkdir()
    with (images / "a.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # too large, so it is not read
    (images / "b.jpg").write_bytes(IMAGES[0])
    (row,) = measure_again(folder, read_mistakes(folder), Rule({IMAGES[0]: 0.1}), images)
    assert row.outcome == "fixed"


def test_each_image_is_kept_with_its_own_bytes(tmp_path: Path) -> None:
    """Images are read before earlier ones are scored, and one file is no image."""
    for index, image in enumerate((*IMAGES[:2], b"no image", IMAGES[2])):
        (tmp_path / f"{index}.jpg").write_bytes(image)
    scores = dict(zip(IMAGES, (0.9, 0.1, 0.8), strict=False))
    folder = tmp_path / "kept"
    reports = list(keep_wrong(Rule(scores), [str(tmp_path)], "real", folder, keep_image=False))
    assert [report.failed for report in reports] == [False, False, True, False]
    kept = {each.sha256: each for each in read_mistakes(folder)}
    assert kept.keys() == {HASHES[0], HASHES[2]}
    assert kept[HASHES[2]].verdicts[0].score == 0.8
    assert all(each.image is None for each in kept.values())
