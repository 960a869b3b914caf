"""Tests of `evaluate.py --scores` with the CSV table of somebody else's detector."""

import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import evaluate
from model.evaluation.scores import read_scores
from model.score_tables.csv_table import _samples_of
from sharding.format import ShardSet, open_shards
from tests.builders import partly, write_shards

ROWS = [f"photos/{n}.jpg,real,{n / 40:.3f},web" for n in range(20)]
ROWS += [f"gan/{n}.png,1,{n / 40 + 0.5:.3f},gan" for n in range(20)]


def table(path: Path, rows: list[str], columns: str = "path,label,score,source") -> Path:
    path.write_text("\n".join([columns, *rows]) + "\n")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate.main, [str(argument) for argument in arguments])


def test_a_table_gets_the_report_of_an_evaluation(tmp_path: Path) -> None:
    file = table(tmp_path / "theirs.csv", [*ROWS, "photos/broken.jpg,0,,web"])
    result = run("--scores", file, "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "; 1 of 41 images without a score" in " ".join(result.output.split())
    assert "not calibrated: 0.5 decides" in result.output
    assert "make demo" not in result.output
    (report,) = (tmp_path / "runs").glob("scores-*-theirs/evaluation/report.json")
    entry = json.loads(report.read_text())["sets"]["images"]
    assert entry["overall"]["auroc"] == 1.0 and entry["overall"]["recall"] == 1.0
    assert entry["overall"]["intervals"]["false_positive_rate"][1] > 0.1
    assert {*entry["sources"]} == {"web", "gan"}
    worse = [re.sub(r",0\.\d+,gan", ",0.3,gan", row) for row in ROWS] + ["photos/broken.jpg,0,,web"]
    other = table(tmp_path / "worse.csv", worse)
    assert run("--scores", other, "--out", tmp_path / "b").exit_code == 0
    compared = run("compare", report.parent, tmp_path / "b")
    assert compared.exit_code == 0, compared.output
    assert "theirs" in compared.output and "worse" in compared.output


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        (ROWS, "path,label,logit,source", "; add or rename: score or probability (in lower"),
        (ROWS, "name,class,score,source", "; add or rename: key or path; label (in lower"),
        (["a.jpg,2,0.5,x"], None, "line 2: label is '2', expected real or 0, or fake or 1"),
        (["a.jpg,0,1.5,x"], None, "line 2: score is '1.5', expected the probability of fake, 0 to"),
        (["a.jpg,0,-3,x"], None, "line 2: score is '-3'"),
        (["a.jpg,0,high,x"], None, "line 2: score is 'high'"),
        (["a.jpg,0,0.1,x", "b,1,1,x", "a.jpg,0,0.1,x"], None, "line 4: 'a.jpg' has a row already"),
        ([",0,0.1,x"], None, "line 2: path is empty, expected the name of an image"),
        ([], None, "has no row, expected one per image"),
        (
            ["a.jpg,0,0,212,x"],
            None,
            "line 2 has 5 cells, the heading 4; write decimals with a point",
        ),
        (["a.jpg,0,0.1,0.9"], "path,label,score,score", "has two columns 'score', expected one"),
        (["a.jpg;0;0,1"], "path;label;score", "separates its columns by semicolons (path;label;"),
        (["a.jpg\t0\t0.1"], "path\tlabel\tscore", "separates its columns by tabs"),
        (['a.jpg,0,0.1,"x'], None, "is not a CSV table in UTF-8"),
    ],
)
def test_a_wrong_table_is_one_line(
    tmp_path: Path, rows: list[str], columns: str | None, said: str
) -> None:
    file = table(tmp_path / "t.csv", rows, columns or "path,label,score,source")
    result = run("--scores", file, "--runs", tmp_path / "runs")
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert said in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([f"{'a' * 9999}.jpg,0,0.1"] * 2, "key,label,score", "aaa.jpg' has a row already, line 2"),
        (["a,0,0.1"], f"key,label,{'s' * 9999}", "ss'; add or rename: score or probability"),
        (["a,0,0.1"], "key,label" + ",x%d" * 999 % (*range(999),), "'x17' and 981 more; add or"),
        (["a,0,0.1"], "key,label,score" + f",{'s' * 9999}" * 2, "ss', expected one; rename"),
        ([f"a,{'9' * 9999},0.1"], "key,label,score", "99', expected real or 0, or fake or 1"),
        ([f"a,0,{'9' * 9999}"], "key,label,score", "99', expected the probability of fake"),
    ],
)  # fmt: skip
def test_a_long_cell_is_cut_in_a_message(
    tmp_path: Path, rows: list[str], columns: str, said: str
) -> None:
    file = table(tmp_path / "t.csv", rows, columns)
    result = run("--scores", file, "--runs", tmp_path / "runs")
    assert result.exit_code == 1 and said in result.output, result.output
    assert len(result.output) < 500 + len(str(file))


def test_a_long_name_is_cut_in_what_is_said_of_a_set(data: Path, tmp_path: Path) -> None:
    shards = open_shards([data / "val"])
    origin, label = shards.table.column("origin")[0].as_py(), int(shards.column("label")[0])
    path = f"{'a' * 999}/{origin}"
    words = ("--shards", "val", "--data", data, "--out", tmp_path / "out")
    for rows, said in (
        (["b" * 999 + ",0.5,0"], "bbb', expected keys or paths such as"),
        ([f"{path},0.5,{1 - label}"], f"{origin}' is {('fake', 'real')[label]}, but "),
        ([f"{path},0.5,{label}", "b" * 999 + ",0.5,0"], "1 row of no image of val, not used"),
    ):
        result = run("--scores", table(tmp_path / "t.csv", rows, "path,score,label"), *words)
        assert said in " ".join(result.output.split()), result.output
        assert "a" * 200 not in result.output and "b" * 200 not in result.output


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "is UTF-16, expected"),
        ("utf-16-le", "is UTF-16, expected"),
        ("latin-1", "in anot"),
    ],
)
def test_another_encoding_is_named(tmp_path: Path, encoding: str, said: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text("path,label,score\n\xe9.png,0,0.1\n", encoding=encoding)
    result = run("--scores", file, "--runs", tmp_path / "runs")
    assert result.exit_code == 1 and said in result.output, result.output
    assert "CSV table in UTF-8; save it as UTF-8" in result.output


def test_columns_without_a_heading(tmp_path: Path) -> None:
    """pandas writes the first one, spreadsheets the last ones."""
    file = table(tmp_path / "t.csv", [f"{n},{row},," for n, row in enumerate(ROWS)],
                 ",path,label,score,source,,")  # fmt: skip
    result = run("--scores", file, "--runs", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert "columns not used: (no heading)" in result.output


def test_advice_on_a_table_without_real_images_can_be_followed(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv", ROWS[20:], "path,label,score,source")
    result = run("--scores", file, "--runs", tmp_path / "runs")
    said = " ".join(result.output.split())
    assert "about false alarms; add real images" in said and "--reference-reals" not in said


def names_of(shards: ShardSet) -> list[str]:
    """Return names of the samples in the four forms that a table may have, in turn."""
    forms = []
    for row, (key, origin) in enumerate(
        zip(*(shards.table.column(name).to_pylist() for name in ("key", "origin")), strict=True)
    ):
        known = (key, origin, f"C:\\raw\\{origin}", f"data/x/old-train-00000.tar/{key}.jpg")
        forms.append(known[row % 4])
    return forms


def test_a_row_counts_in_each_set_with_its_image(data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "shards"
    for name in ("val", "again"):
        shutil.copytree(data / "val", copied / name)
    labels = open_shards([data / "val"]).column("label")
    keys = open_shards([data / "val"]).table.column("key").to_pylist()
    rows = [f"{key},{float(label)},0.5" for key, label in zip(keys, labels, strict=True)]
    file = table(tmp_path / "t.csv", rows, "key,label,score")
    words = ("--shards", "val", "--shards", "again", "--data", copied, "--out", tmp_path / "out")
    result = run("--scores", file, *words)
    assert result.exit_code == 0, result.output
    sets = json.loads((tmp_path / "out/report.json").read_text())["sets"]
    assert sets["val"]["overall"] == sets["again"]["overall"]


DETECTOR = """
def predict(images):
    return [image.getpixel((0, 0))[0] / 255 for image in images]
"""


@pytest.mark.usefixtures("no_workers")
def test_scores_of_a_set_without_real_images_have_its_reference(tmp_path: Path) -> None:
    """As in an evaluation: the figures are those of the detector's own report."""
    plan = {"fakes": {"gan": (partly, 0, 8)}, "photos": {"web": (partly, 8, 0)}}
    shards, own = write_shards(tmp_path, plan), tmp_path / "own.toml"
    own.write_text((tmp_path / "catalog.toml").read_text() + '[reference]\nfakes = "photos"\n')
    (tmp_path / "detector.py").write_text(DETECTOR)
    words = ("--shards", "fakes", "--data", shards, "--catalog", own)
    of_detector = ("--detector", tmp_path / "detector.py", "--trust", "--device", "cpu")
    measured = run(*words, *of_detector, "--runs", tmp_path / "runs", "--out", tmp_path / "a")
    assert measured.exit_code == 0, measured.output
    scores = read_scores(tmp_path / "a/scores.parquet")
    keys = scores.table.column("key").to_pylist()
    probabilities = scores.numbers("probability").tolist()
    rows = [f"{key},{score!r}" for key, score in zip(keys, probabilities, strict=True)]
    file = table(tmp_path / "t.csv", rows, "key,score")
    result = run("--scores", file, *words, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "8 real images of photos called fake" in " ".join(result.output.split())
    one, other = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    assert one["sets"] == other["sets"] and [*one["sets"]] == ["fakes"]
    compared = run("compare", tmp_path / "a", tmp_path / "b")
    assert compared.exit_code == 0, compared.output
    assert run("--scores", file, "--reference-reals", "photos").exit_code == 2
    table(file, [row for row in rows if "gan" in row], "key,score")
    without = run("--scores", file, *words, "--out", tmp_path / "c")
    said = " ".join(without.output.split())
    assert "no row is of a real image of photos, which the catalog names as reference" in said
    assert "NO REAL IMAGES AT HAND" in said and "with --reference-reals" in said
    asked = run("--scores", file, *words, "--reference-reals", "photos", "--out", tmp_path / "c")
    assert asked.exit_code == 1
    assert "no row is of a real image of photos, the set of --reference-reals" in asked.output


def test_scores_of_a_packed_set_have_its_images(data: Path, tmp_path: Path) -> None:
    shards = open_shards([data / "val"])
    scores = np.linspace(0, 1, len(shards)).tolist()
    rows = [f"{name},{score!r}" for name, score in zip(names_of(shards), scores, strict=True)]
    columns = "path,probability"
    file = table(tmp_path / "t.csv", [*rows[1:], "else/where.jpg,0.3"], columns)
    words = ("--shards", "val", "--data", data, "--out", tmp_path / "out")
    result = run("--scores", file, *words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "1 row of no image of val, not used (first: line " in said
    assert "1 of " in said and "without a score" in said
    read = read_scores(tmp_path / "out/scores.parquet")
    assert read.numbers("probability")[1:].tolist() == scores[1:]
    assert not read.numbers("valid")[0] and read.numbers("valid")[1:].all()
    assert read.table.column("sha256").to_pylist() == shards.table.column("sha256").to_pylist()
    assert read.evaluation["sets"]["val"]["index_sha256"] == shards.sha256
    label = ("fake", "real")[int(shards.column("label")[0])]
    for wrong, said in (
        ([f"{rows[0]},{label}"], f"is {label}, but "),
        (["else/where.jpg,0.3,0"], "no row is of an image of val; the first is 'else/where.jpg'"),
        ([f"{rows[0]},", f"{shards.table.column('origin')[0]},0.5,"], "label is ''"),
    ):
        result = run("--scores", table(tmp_path / "t.csv", wrong, f"{columns},label"), *words)
        assert result.exit_code == 1 and said in result.output, result.output
        path = repr(shards.table.column("origin")[0].as_py())
        assert "else" not in wrong[0] or f" or {path}" in result.output
    table(tmp_path / "t.csv", rows, columns)
    for name in ("val", "train"):  # a report of other sets took the place of the first
        words = ("--shards", name, "--data", data, "--runs", tmp_path / "runs")
        run("--scores", file, *words)
    assert [*(tmp_path / "runs").glob("scores-*-t/evaluation/val/report.json")]
    words = ("--shards", "val", "--data", data, "--out", tmp_path / "out")
    table(tmp_path / "t.csv", [rows[0], f"{shards.table.column('origin')[0]},0.5"], columns)
    assert "has a row already, line 2" in run("--scores", file, *words).output


def test_a_path_of_many_parts_takes_no_memory() -> None:
    """As in a table of labels: each row of 120 kB took 18 seconds."""
    samples = {"a/0.png": {"val": 3}, "0": {"val": 3}}
    name = "x/" * 5_000 + "a/0.png"
    tracemalloc.start()
    of_rows = [_samples_of(text, samples, 2) for text in (name, f"{name}/b.png")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert of_rows == [{"val": 3}, {}]
    assert peak < 5 * 2**20
