"""Tests of `predict.py --report-mistake` and `evaluate.py --regressions`, and of the entries."""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner, Result

import evaluate
import predict
from imaging.decode import DecodeError
from model.mistakes import keep
from model.mistakes.keep import (
    Label,
    Mistake,
    MistakeError,
    Verdict,
    keep_mistake,
    read_mistake,
    read_mistakes,
    standing_of,
    with_verdict,
)
from model.mistakes.regressions import OUTCOMES, Regression, find_files, record
from model.verdict import VERDICTS
from tests.builders import ROOT, encode, photo

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]

NO_SIGN, UNCERTAIN, LIKELY = VERDICTS
DATA = encode(photo(1))
HASH = hashlib.sha256(DATA).hexdigest()


def said(verdict: str, detector: str = "a") -> Verdict:
    score = {NO_SIGN: 0.1, UNCERTAIN: 0.5, LIKELY: 0.9}[verdict]
    return Verdict(detector=detector, score=score, verdict=verdict, band=(0.4, 0.6), date="2026")


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def add(folder: Path, label: str, image: Path, detector: Path, *more: str) -> Result:
    line = [image, "--report-mistake", label, "--mistakes", folder, "--detector", detector]
    return run(predict.main, *line, "--trust", *more)


def measure(folder: Path, detector: Path, *more: object) -> Result:
    return run(evaluate.main, "--regressions", folder, "--detector", detector, "--trust", *more)


@pytest.fixture
def detectors(tmp_path: Path) -> dict[str, Path]:
    """Return detectors that give every image the same score. `wrong` and `wrong2` differ."""
    scores = {"wrong": 0.9, "right": 0.1, "wrong2": 0.8}
    for name, score in scores.items():
        (tmp_path / f"{name}.py").write_text(f"def predict(images): return [{score}] * len(images)")
    return {name: tmp_path / f"{name}.py" for name in scores}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "photos" / "mine.jpg"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize(
    ("label", "verdict", "stands"),
    [("real", LIKELY, "wrong"), ("real", NO_SIGN, "right"), ("fake", LIKELY, "right"),
     ("fake", NO_SIGN, "wrong"), ("real", UNCERTAIN, "uncertain"),
     ("fake", UNCERTAIN, "uncertain")],
)  # fmt: skip
def test_only_a_wrong_verdict_is_kept(
    label: Label, verdict: str, stands: str, tmp_path: Path
) -> None:
    assert standing_of(label, verdict) == stands
    kept = keep_mistake(tmp_path / "kept", DATA, label, said(verdict))
    assert kept.kept == (stands == "wrong") == (tmp_path / "kept").exists()
    if stands == "right":
        assert kept.text == "the verdict agrees; nothing kept"


def test_keep_mistake_keeps_one_entry_per_image(tmp_path: Path) -> None:
    kept = keep_mistake(tmp_path, DATA, "real", said(LIKELY))
    assert kept.text == "kept, without its image"
    assert [path.name for path in tmp_path.iterdir()] == [f"{HASH}.json"]
    entry = json.loads((tmp_path / f"{HASH}.json").read_text())
    assert entry == {
        "sha256": HASH, "label": "real", "image": None,
        "verdicts": [{"detector": "a", "score": 0.9, "verdict": LIKELY, "band": [0.4, 0.6],
                      "date": "2026"}],
    }  # fmt: skip
    again = keep_mistake(tmp_path, DATA, "real", said(LIKELY), copy_named="x/My photo.JPG")
    assert again.text == "kept already, with its image"
    (mistake,) = read_mistakes(tmp_path)
    assert len(mistake.verdicts) == 1
    assert (tmp_path / f"{HASH}.jpg").read_bytes() == DATA
    keep_mistake(tmp_path, DATA, "real", said(LIKELY), copy_named="other.../name")
    assert len(list(tmp_path.iterdir())) == 2  # one copy, with the suffix of its first name


def test_a_name_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    keep_mistake(tmp_path / "k", DATA, "real", said(LIKELY), copy_named="x./../../evil")
    assert {path.name for path in (tmp_path / "k").iterdir()} == {f"{HASH}.json", f"{HASH}.img"}


def test_a_changed_label_is_reported_and_can_remove_the_entry(tmp_path: Path) -> None:
    keep_mistake(tmp_path, DATA, "real", said(LIKELY), copy_named="a.png")
    noted = keep_mistake(tmp_path, DATA, "real", said(NO_SIGN, "b"))
    assert noted.kept and noted.text == "kept; this verdict is right, with its image"
    other = keep_mistake(tmp_path, DATA, "fake", said(LIKELY))
    assert other.kept and other.label_was == "real"  # as a fake, the verdict of b is wrong
    assert other.text.startswith("the label was real and is fake now: kept")
    assert read_mistakes(tmp_path)[0].label == "fake"
    keep_mistake(tmp_path, DATA, "fake", said(LIKELY, "b"))
    assert not list(tmp_path.iterdir())


def test_what_others_changed_while_images_were_scored_stays(tmp_path: Path) -> None:
    """The page and `predict.py` write at the same time."""
    for data in (b"1", b"2"):
        keep_mistake(tmp_path, data, "fake", said(NO_SIGN), copy_named="a.jpg")
    keep_mistake(tmp_path, b"3", "fake", said(NO_SIGN))
    rows = [
        Regression(mistake=each, before=each.verdicts[0], after=said(LIKELY, "c"), outcome="fixed")
        for each in read_mistakes(tmp_path)
    ]
    keep_mistake(tmp_path, b"1", "real", said(LIKELY, "b"))
    keep_mistake(tmp_path, b"2", "real", said(NO_SIGN))
    record(tmp_path, rows)
    entries = {each.sha256: each for each in read_mistakes(tmp_path)}
    first, removed, third = (hashlib.sha256(data).hexdigest() for data in (b"1", b"2", b"3"))
    assert removed not in entries and entries[first].label == "real"
    assert [each.detector for each in entries[first].verdicts] == ["a", "b", "c"]
    assert [each.detector for each in entries[third].verdicts] == ["a", "c"]


def test_verdicts_of_several_writers_are_all_kept(tmp_path: Path) -> None:
    def write(name: str) -> None:
        for index in range(25):
            keep_mistake(tmp_path, DATA, "real", said(LIKELY, f"{name}{index}"))

    child = os.fork()
    if not child:
        write("child")
        os._exit(0)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "ab"))
    assert os.waitpid(child, 0)[1] == 0
    assert len(read_mistakes(tmp_path)[0].verdicts) == 75


def test_image_entry_and_folder_have_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(MistakeError, match="too many for a copy"):
        keep_mistake(tmp_path, DATA, "real", said(LIKELY), copy_named="a.jpg")
    monkeypatch.setattr(keep, "MAX_MISTAKES", 1)
    keep_mistake(tmp_path, b"first", "real", said(LIKELY))
    with pytest.raises(MistakeError, match="which is the limit"):
        keep_mistake(tmp_path, b"second", "real", said(LIKELY))
    mistake = Mistake(sha256=HASH, label="real", verdicts=(said(LIKELY, "first"),))
    for index in range(keep.MAX_VERDICTS + 5):
        mistake = with_verdict(mistake, said(LIKELY, str(index)))
    assert len(mistake.verdicts) == keep.MAX_VERDICTS
    assert mistake.verdicts[0].detector == "first"
    assert mistake.verdicts[-1].detector == str(keep.MAX_VERDICTS + 4)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("not JSON", "Expecting value in line 1"),
        ("[]", "it holds list, expected an object"),
        ("[" * 100_000, "it is nested too deeply"),
        ('{"label": "real"}', "sha256 is missing"),
        ({"label": "maybe"}, "label takes 'real' or 'fake', got \"maybe\""),
        ({"image": "/../../x"}, 'image takes the suffix of an image, got "/../../x"'),
        ({"image": []}, r"image takes a text, got \[\]"),
        ({"verdicts": []}, "verdicts takes a length of at least 1, got 0"),
        ({"verdicts": [1]}, r"verdicts.0 takes an object, got 1"),
        ({"sha256": "0" * 64}, "its hash is not that of its file name"),
    ],
)
def test_a_damaged_entry_gives_an_error_of_one_line(
    change: str | dict, fault: str, tmp_path: Path
) -> None:
    keep_mistake(tmp_path, DATA, "real", said(LIKELY))
    path = tmp_path / f"{HASH}.json"
    entry = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps({**entry, **change}))
    with pytest.raises(MistakeError, match=rf"is no entry of a mistake \({fault}.*; remove it"):
        read_mistake(path)
    result = run(evaluate.main, "--regressions", tmp_path)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1


def test_a_mistake_is_measured_with_several_detectors(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    folder, report = tmp_path / "kept", tmp_path / "again" / "regressions.json"
    result = add(folder, "real", image, detectors["right"])
    assert result.exit_code == 0 and "the verdict agrees; nothing kept" in result.output
    result = add(folder, "real", image.parent, detectors["wrong"], "--keep-image")
    assert result.exit_code == 0 and "likely AI (90.0%); kept, with its image" in result.output
    outcomes = []
    for name in ("wrong", "right", "wrong2", "wrong2"):
        result = measure(folder, detectors[name], "--out", report.parent)
        (row,) = json.loads(report.read_text())["mistakes"]
        outcomes.append(
            (row["outcome"], row["before"]["score"], row["after"]["score"], result.exit_code)
        )
        assert f"1 {row['outcome']}" in result.output
    assert outcomes == [
        ("still wrong", 0.9, 0.9, 0), ("fixed", 0.9, 0.1, 0),
        ("newly wrong", 0.1, 0.8, 1), ("newly wrong", 0.1, 0.8, 1),
    ]  # fmt: skip
    assert "newly wrong: 1 image that another detector got right" in result.stderr
    assert "no sign of AI 0.100" in result.output and "likely AI 0.800" in result.output
    verdicts = read_mistakes(folder)[0].verdicts
    assert [each.score for each in verdicts] == [0.9, 0.1, 0.8]
    assert [each.detector.split()[0] for each in verdicts] == [
        str(detectors[name]) for name in ("wrong", "right", "wrong2")
    ]


def test_the_page_names_the_outcomes_and_fields_of_the_file(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    page = (ROOT / "docs/mistakes.md").read_text(encoding="utf-8")
    table = page.split("| outcome | meaning |\n|---|---|\n")[1].split("\n\n")[0]
    assert {line.split("|")[1].strip() for line in table.splitlines()} == {*OUTCOMES}
    add(tmp_path / "kept", "real", image, detectors["wrong"], "--keep-image")
    measure(tmp_path / "kept", detectors["right"], "--out", tmp_path)
    written = json.loads((tmp_path / "regressions.json").read_text())
    (row,) = written["mistakes"]
    fields = page.split("`regressions.json` has")[1].split("\n\n")[0]
    assert {*re.findall(r"`(\w+)`", fields)} == {*written, *row, *row["before"]}


def test_an_image_without_a_copy_is_found_by_its_bytes(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    folder = tmp_path / "kept"
    assert add(folder, "real", image, detectors["wrong"]).exit_code == 0
    result = measure(folder, detectors["right"])
    assert result.exit_code == 1 and "give the folder of the image with --images" in result.stderr
    image.rename(image.with_name("renamed.jpg"))
    image.with_name("another.jpg").write_bytes(encode(photo(2)))
    result = measure(folder, detectors["right"], "--images", image.parent)
    assert result.exit_code == 0 and "1 fixed" in result.output
    result = measure(folder, detectors["right"], "--images", folder)
    assert result.exit_code == 1 and "no file below" in result.stderr


def test_mistakes_that_cannot_be_measured_are_counted_with_reasons(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    folder = tmp_path / "kept"
    add(folder, "real", image, detectors["wrong"], "--keep-image")
    image.write_bytes(encode(photo(2)))
    add(folder, "real", image, detectors["wrong"])
    other = image.with_name("other.jpg")
    other.write_bytes(encode(photo(3)))
    add(folder, "real", other, detectors["wrong"], "--keep-image")
    (folder / f"{HASH}.jpg").write_bytes(encode(photo(4)))
    result = measure(folder, detectors["right"])
    assert result.exit_code == 0, result.output
    assert "1 fixed, 2 not measurable" in result.output
    assert "its copy has changed since it was scored" in result.output
    assert "no copy of its image was kept" in result.output
    assert len(read_mistake(folder / f"{HASH}.json").verdicts) == 1


def test_an_image_whose_copy_has_changed_is_looked_for(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    folder = tmp_path / "kept"
    add(folder, "real", image, detectors["wrong"], "--keep-image")
    (folder / f"{HASH}.jpg").write_bytes(b"changed")
    result = measure(folder, detectors["right"], "--images", image.parent)
    assert result.exit_code == 0 and "1 fixed" in result.output, result.output
    image.rename(tmp_path / "elsewhere.jpg")
    result = measure(folder, detectors["right"], "--images", image.parent)
    assert result.exit_code == 1 and "its copy has changed since it was scored" in result.output


def test_a_file_that_changes_before_it_is_scored_is_not_called_a_copy(
    tmp_path: Path, image: Path
) -> None:
    keep_mistake(tmp_path / "kept", DATA, "real", said(LIKELY))
    mistakes = read_mistakes(tmp_path / "kept")
    (file,) = find_files(tmp_path / "kept", mistakes, image.parent).values()
    assert file.read() == DATA
    image.write_bytes(b"changed")
    with pytest.raises(DecodeError, match=r"its file below .*photos has changed since it was fou"):
        file.read()


def test_paths_of_mistakes_may_come_from_standard_input(
    tmp_path: Path, image: Path, detectors: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(b"a file of this name is not meant")
    line = ["-", "--report-mistake", "real", "--detector", str(detectors["wrong"]), "--trust"]
    result = CliRunner().invoke(predict.main, line, input=f"{image}\n\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{image}: likely AI (90.0%); kept, without its image\n"
    assert [mistake.sha256 for mistake in read_mistakes(tmp_path / "mistakes")] == [HASH]
    result = CliRunner().invoke(predict.main, line, input="\n")
    assert result.exit_code == 2 and "standard input named no image" in result.stderr


def test_an_unreadable_image_is_an_error_and_the_others_are_kept(
    tmp_path: Path, image: Path, detectors: dict[str, Path]
) -> None:
    image.with_name("broken.jpg").write_bytes(b"no image")
    result = add(tmp_path / "kept", "real", image.parent, detectors["wrong"])
    assert result.exit_code == 1
    assert "broken.jpg" in result.output and "1 of 2 images failed" in result.stderr
    assert [mistake.sha256 for mistake in read_mistakes(tmp_path / "kept")] == [HASH]
    result = add(tmp_path / "kept", "real", tmp_path / "kept", detectors["wrong"])
    assert result.exit_code == 2 and "no image in" in result.stderr


def test_the_error_of_an_empty_folder_names_the_command_that_adds(tmp_path: Path) -> None:
    result = run(evaluate.main, "--regressions", tmp_path)
    assert result.exit_code == 1 and "python predict.py PATH --report-mistake" in result.stderr


def test_entries_are_equal_after_reading(tmp_path: Path) -> None:
    keep_mistake(tmp_path, DATA, "fake", said(NO_SIGN), copy_named="a.webp")
    (mistake,) = read_mistakes(tmp_path)
    expected = Mistake(sha256=HASH, label="fake", verdicts=(said(NO_SIGN),), image=".webp")
    assert mistake == expected


def test_mistakes_go_to_the_folder_of_the_environment_variable(
    tmp_path: Path, image: Path, detectors: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_MISTAKES", str(tmp_path / "mine"))
    line = [image, "--report-mistake", "real", "--detector", detectors["wrong"], "--trust"]
    assert run(predict.main, *line).exit_code == 0
    assert len(read_mistakes(tmp_path / "mine")) == 1
    monkeypatch.setenv("DETECTOR_MISTAKES", "")
    monkeypatch.chdir(tmp_path)
    assert run(predict.main, *line).exit_code == 0
    assert len(read_mistakes(tmp_path / "mistakes")) == 1


@pytest.mark.parametrize(
    ("command", "line", "said"),
    [
        (predict, ["--report-mistake", "real", "--out", "x.csv"], "--report-mistake cannot be"),
        (predict, ["--report-mistake", "real", "--format", "csv"], "combined with --format"),
        (predict, ["--report-mistake", "fake", "--heatmap", "x"], "combined with --heatmap"),
        (predict, ["--report-mistake", "fake", "--trust-list", "x"], "combined with --trust-list"),
        (predict, ["--report-mistake", "fake", "--batch-size", "8"], "combined with --batch-size"),
        (predict, ["--keep-image"], "add --report-mistake"),
        (predict, ["--mistakes", "kept"], "add --report-mistake"),
        (predict, ["--onnx", "x.onnx", "--backend", "dali"], "combined with --backend dali"),
        (predict, ["--threshold", "0.5", "--max-miss", "0.1"], "combined with --max-miss"),
        (evaluate, ["--regressions", ".", "--shards", "val"], "combined with --shards"),
        (evaluate, ["--regressions", ".", "--robustness"], "combined with --robustness"),
        (evaluate, ["--images", "."], "add --regressions FOLDER"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_name(
    command: ModuleType, line: list[str], said: str, image: Path
) -> None:
    result = run(command.main, *([image] if command is predict else []), *line)
    assert result.exit_code == 2
    assert said in result.stderr and len(result.stderr.splitlines()) == 4
