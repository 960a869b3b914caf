"""All commands run as a person types them, with a checkpoint trained on the tiny sets."""

import csv
import html
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import evaluate
import predict
import train
from locks import locked
from model import checkpoint, load_detector
from model.__main__ import main as model
from model.calibration.calibrate import scorer_of, store_calibration
from model.calibration.fit import Calibration, CalibrationError
from model.distributed import DistEnv
from model.evaluation.scoring import score_all
from model.export.card import card_of
from model.recipe import LOCK_FILE
from model.verdict import VERDICTS, percent, probability
from pipeline.__main__ import main as pipeline
from pipeline.loading import Loading
from pipeline.perturb import PERTURBATIONS
from pipeline.read import ShardReader
from serve.__main__ import main as serve
from sharding.__main__ import main as sharding
from sharding.format import open_shards
from sharding.lock import changing
from tests.browser import html_of
from tests.builders import ROOT, encode, photo, train_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder with the run `tiny` and its checkpoint."""
    return train_tiny(data, tmp_path_factory.mktemp("runs"))


def run(command, *arguments: object):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_build_without_raw_data_lists_the_known_sources(tmp_path: Path) -> None:
    result = run(sharding, "build", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert result.exit_code == 1
    for said in ("tiny_genimage", "kaggle.com", "not there", "Nothing to build", "make demo"):
        assert said in result.output
    assert f"Nothing to build below {tmp_path / 'raw'}" in result.output


def test_a_source_folder_of_links_is_reported(raw: Path, tmp_path: Path) -> None:
    """Alone, such a source is an error; among other sources, its warning must still be printed."""
    folder = tmp_path / "raw"
    (folder / "dummy").mkdir(parents=True)
    (folder / "dummy" / "fake").symlink_to(raw / "dummy" / "fake", target_is_directory=True)
    said = "excluded: dummy: 1 file: a symbolic link, which is not followed"
    arguments = "--catalog", raw / "catalog.toml", "--out", tmp_path / "out", "--jobs", 1
    alone = run(sharding, "build", "--raw", folder, *arguments)
    assert alone.exit_code == 1
    assert "no image in source: dummy" in alone.output and said in alone.output
    shutil.copytree(raw / "alpha", folder / "alpha")
    beside = run(sharding, "build", "--raw", folder, *arguments)
    assert beside.exit_code == 0, beside.output
    assert "no image in source: dummy" in beside.output and said in beside.output


def test_build_and_show(raw: Path, tmp_path: Path) -> None:
    result = run(
        sharding, "build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", tmp_path,
        "--jobs", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "packed" in result.output
    again = run(
        sharding, "build", "--raw", raw, "--catalog", raw / "catalog.toml", "--out", tmp_path
    )
    assert "was up to date" in again.output
    assert "nothing to pack: 3 sets up to date" in again.output
    deeper = run(
        sharding, "build", "--raw", raw / "alpha", "--catalog", raw / "catalog.toml", "--out",
        tmp_path / "other",
    )  # fmt: skip
    assert deeper.exit_code == 1
    assert f"did you mean --raw {raw}?" in deeper.output
    shown = run(sharding, "show", tmp_path / "old")
    assert shown.exit_code == 0
    assert "dummy" in shown.output
    assert "0 quarantined" in shown.output
    missing = run(sharding, "show", tmp_path / "none")
    assert missing.exit_code == 1
    assert "has the sets new, old, val" in missing.output


def test_evaluate_writes_a_report_and_a_table(data: Path, runs: Path, tmp_path: Path) -> None:
    result = run(
        evaluate.main, "--shards", "val", "--data", data, "--runs", runs, "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "checkpoint:" in result.output
    assert "source gamma" in result.output
    assert "generator diffusion" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    overall = report["sets"]["val"]["overall"]
    assert overall["count"] == len(open_shards([data / "val"]))
    assert overall["reals"] + overall["fakes"] == overall["count"]
    assert report["sets"]["val"]["note"] is None
    assert "TRAINED ON" not in result.output
    compared = run(evaluate.main, "compare", tmp_path / "report.json", tmp_path / "report.json")
    assert compared.exit_code == 0, compared.output
    assert "(+0.000 to +0.000)" in compared.output
    assert "largest changes" not in compared.output


def test_sets_and_runs_in_use_are_locked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build refuses to change a set that a training, an evaluation or a calibration reads, and a
    calibration refuses a run in training, which may remove the checkpoint.
    """
    runs, busy = tmp_path / "runs", pytest.raises(BlockingIOError, match="another process reads")

    def too_few(*_: object) -> None:
        raise CalibrationError("too few, but scored")

    class Reader(ShardReader):
        def read(self, samples):
            for folder in set(self.shards.folders):
                with busy, changing(folder, (), writes=True):
                    pass
            return super().read(samples)

    monkeypatch.setattr("pipeline.loader.ShardReader", Reader)
    monkeypatch.setattr("model.calibration.fit.FEWEST", 1)
    monkeypatch.setattr("model.calibration.calibrate.calibrate_by", too_few)
    train_tiny(data, runs, "loading.num_workers=0", "loading.backend=pil")
    common = "--shards", "val", "--data", data, "--runs", runs, "--backend", "pil"
    assert run(evaluate.main, *common).exit_code == 0
    assert "too few, but scored" in run(evaluate.main, "calibrate", *common).output
    with locked(runs / "tiny" / LOCK_FILE):
        result = run(evaluate.main, "calibrate", *common)
    assert result.exit_code == 1 and "tiny is being trained, and may replace step" in result.output


def cells_of(output: str, first: str, edge: str = "│") -> list[str]:
    """Return the cells of a table row after the first cell, without intervals in parentheses."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{edge} {first} ")]
    return [cell.split()[0] for cell in line.strip(edge).split(edge)[1:]]


def test_training_evaluation_and_card_agree(
    data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last table of training, the table of evaluation and the model card have equal figures."""
    copy = shutil.copytree(runs, tmp_path / "runs")
    best = checkpoint.find(copy, None)
    calibration = Calibration(
        temperature=0.2, threshold=0.61, threshold_at="auto", reals=40, fakes=30,
        band=(0.3, 0.6), roc=[], before={}, after={},
    )  # fmt: skip
    scorer = scorer_of(best, Loading(num_workers=0), torch.device("cpu"), DistEnv())
    scored = score_all({"val": open_shards([data / "val"])}, scorer)
    store_calibration(best, calibration, {}, scored, DistEnv())
    meta = checkpoint.read_meta(best)
    train._print_validation(meta)
    trained = capsys.readouterr().out
    arguments = "--shards", "val", "--data", data, "--runs", copy, "--out", tmp_path
    evaluated = run(evaluate.main, *arguments).stdout
    report = json.loads((tmp_path / "report.json").read_text())
    card = card_of(meta, report, {}, onnx=False)
    assert "threshold 0.610\n" in trained and "threshold 0.610\n" in evaluated
    assert "called fake from a probability of 0.610 on" in card
    for name, row, on_card in (
        ("val", "overall", "val"), ("val/gamma", "source gamma", r"val\: gamma"),
    ):  # fmt: skip
        images, *figures = cells_of(trained, name)
        reals, fakes, *others = cells_of(evaluated, row)
        assert int(images) == int(reals) + int(fakes)
        assert others[:4] == figures  # accuracy, recall, false positives, AUROC
        assert cells_of(card, f"{on_card} |", "|")[2:] == figures[1:]


def test_evaluating_on_training_data_is_said_in_the_first_line(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    """The set is recognized by its hash, whatever its name is."""
    shutil.copytree(data / "old", tmp_path / "data" / "renamed")
    shutil.copytree(data / "val", tmp_path / "data" / "val")
    arguments = "--data", tmp_path / "data", "--runs", runs, "--out", tmp_path / "out"
    result = run(evaluate.main, "--shards", "val", "--shards", "renamed", *arguments)
    assert result.exit_code == 0, result.output
    first = result.stdout.splitlines()[0]
    assert first.startswith("THE CHECKPOINT WAS TRAINED ON renamed: its figures for these sets")
    assert "TRAINED ON" in (tmp_path / "out" / "report.html").read_text()
    result = run(evaluate.main, "--shards", "val", "--reference-reals", "renamed", *arguments)
    assert result.stdout.startswith("THE CHECKPOINT WAS TRAINED ON renamed")


def test_a_set_that_was_built_again_may_have_been_learned(
    data: Path, runs: Path, tmp_path: Path
) -> None:
    """The name is that of a training set, the hash is not: it may be an unrelated set, too."""
    shutil.copytree(data / "val", tmp_path / "data" / "old")
    out = tmp_path / "out"
    arguments = "--data", tmp_path / "data", "--runs", runs, "--out", out
    result = run(evaluate.main, "--shards", "old", *arguments)
    assert result.exit_code == 0, result.output
    said = "THE CHECKPOINT MAY HAVE LEARNED IMAGES OF old: it was trained on another set of that"
    assert result.stdout.startswith(said) and "WAS TRAINED ON" not in result.output
    assert said in result.stderr  # at once, before the images are scored
    assert said in (out / "report.html").read_text()
    written = json.loads((out / "report.json").read_text())
    assert (written["trained_on"], written["maybe_trained_on"]) == ([], ["old"])
    assert written["headline"][0].startswith(said)


def test_robustness_and_the_files_of_a_report(data: Path, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        evaluate.main, "--shards", "val", "--data", data, "--runs", runs, "--out", out,
        "--robustness", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "val, perturbed" in result.output and "fakes re-encoded as" in result.output
    robustness = json.loads((out / "report.json").read_text())["sets"]["val"]["robustness"]
    assert [row["name"] for row in robustness["perturbations"]] == [
        way.name for way in PERTURBATIONS
    ]
    assert robustness["images"] == 4 < robustness["of"]
    tables = [
        list(csv.DictReader(io.StringIO((out / name).read_text())))
        for name in ("figures.csv", "robustness.csv")
    ]
    assert {row["what"] for row in tables[0]} == {"overall", "class", "source", "generator"}
    assert len(tables[1]) == len(PERTURBATIONS) + len(robustness["codec_swap"])
    page = (out / "report.html").read_text()
    assert "jpeg-90" in page and "data:image/jpeg;base64," in page
    # The report is rebuilt from the scores, without the network and without images.
    again = run(
        evaluate.main, "--scores", out / "scores.parquet", "--out", tmp_path / "again",
        "--data", tmp_path / "gone",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    for name in ("report.json", "figures.csv", "robustness.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert "data:image/jpeg" not in (tmp_path / "again" / "report.html").read_text()
    assert not list(tmp_path.rglob("*.partial"))


def test_robustness_takes_a_number_or_none(data: Path, runs: Path) -> None:
    """`--robustness` without a number uses its default, also before another option."""
    for arguments, expected in (
        (["--robustness", "--shards", "val"], evaluate.PER_CLASS), (["--robustness", "7"], 7),
        ([], None),
    ):  # fmt: skip
        context = evaluate.main.make_context("evaluate", arguments, resilient_parsing=True)
        assert context.params["robustness"] == expected
    result = run(
        evaluate.main, "--robustness", 0, "--shards", "val", "--data", data, "--runs", runs
    )
    assert result.exit_code == 2 and "0 is not in the range" in result.output


def test_a_set_without_reals_gives_a_sentence(runs: Path, raw: Path, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(
        '[sets]\nevalgen = "test"\n[sources.dummy]\nlicense = "x"\nset = "evalgen"\nfake = ["fake"]'
    )
    built = run(
        sharding, "build", "--raw", raw, "--catalog", catalog, "--out", tmp_path, "--jobs", 1
    )
    assert built.exit_code == 0, built.output
    result = run(evaluate.main, "--shards", "evalgen", "--data", tmp_path, "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "There are no real images here" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no set to measure on"),
        (["--shards", "nope"], "no shard set at"),
        (["--shards", "val", "--device", "gpu"], "no such device: gpu"),
    ],
)
def test_evaluate_mistakes(data: Path, runs: Path, arguments: list[str], said: str) -> None:
    result = run(evaluate.main, *arguments, "--data", data, "--runs", runs)
    assert result.exit_code != 0
    assert said in result.output


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with good images, a broken image, and a file that is not an image."""
    folder = tmp_path / "photos"
    (folder / "inside").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encode(photo(1)))
    (folder / "inside" / "b.PNG").write_bytes(encode(photo(2), "PNG"))
    (folder / "inside" / "c, d.gif").write_bytes(encode(photo(3), "GIF"))
    (folder / "broken.jpg").write_bytes(encode(photo(4))[:200])
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_predict_prints_a_line_per_image(runs: Path, photos: Path) -> None:
    result = run(predict.main, photos, "--runs", runs)
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if any(v in line for v in VERDICTS)]
    assert len(lines) == 3
    assert sum("unreadable" in line for line in result.stdout.splitlines()) == 1
    assert "1 of 4 images have no verdict" in result.output
    (photos / "broken.jpg").unlink()
    assert run(predict.main, photos, "--runs", runs).exit_code == 0


def test_predict_as_csv_and_jsonl(runs: Path, photos: Path) -> None:
    table = run(predict.main, photos, "--runs", runs, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(table)))
    lines = run(predict.main, photos, "--runs", runs, "--format", "jsonl").stdout.splitlines()
    objects = [json.loads(line) for line in lines]
    assert [row["path"] for row in rows] == [entry["path"] for entry in objects]
    assert len(rows) == 4
    for row, entry in zip(rows, objects, strict=True):
        if entry["error"]:
            assert (row["probability"], entry["probability"]) == ("", None)
        else:
            assert float(row["probability"]) == pytest.approx(entry["probability"])


def test_predict_without_a_checkpoint_says_how_to_get_one(tmp_path: Path, photos: Path) -> None:
    assert "there is no folder" in run(predict.main, photos, "--runs", tmp_path / "none").output
    (tmp_path / "none").mkdir()
    result = run(predict.main, photos, "--runs", tmp_path / "none")
    assert result.exit_code == 2
    assert "python train.py --phase 1" in result.output
    assert "make demo" in result.output


def test_predict_with_nothing_to_predict(runs: Path, tmp_path: Path) -> None:
    assert "no image in" in run(predict.main, tmp_path, "--runs", runs).output
    assert "does not exist" in run(predict.main, tmp_path / "none", "--runs", runs).output


def test_predict_evaluate_and_python_agree_on_the_same_bytes(
    data: Path, raw: Path, runs: Path
) -> None:
    """The file, the shard read by Pillow and the shard read by DALI give the same probability."""
    import numpy as np
    import torch

    from model.score import score_set
    from pipeline.loader import open_loader

    detector = load_detector(runs=runs)
    shards = open_shards([data / "val"])
    files = [raw / origin for origin in shards.table.column("origin").to_pylist()]
    from_files = np.array([result.probability for result in detector.predict(files)])
    as_bytes = [file.read_bytes() for file in files]
    from_bytes = np.array([result.probability for result in detector.predict(as_bytes, 7)])
    np.testing.assert_allclose(from_bytes, from_files, atol=1e-6)
    for backend, tolerance in (("pil", 1e-6), ("dali", 0.02)):
        loader = open_loader(
            shards, preprocess=detector.preprocess, loading=Loading(backend=backend, num_workers=0),
            device=torch.device("cpu"),
        )  # fmt: skip
        scores = score_set(detector.net, loader)
        np.testing.assert_allclose(probability(scores.logits), from_files, atol=tolerance)


def test_the_page_shows_a_verdict_and_an_error(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamlit.testing.v1 import AppTest

    page = ROOT / "app.py"
    monkeypatch.setenv("DETECTOR_RUNS", str(runs))
    shown = AppTest.from_file(str(page), default_timeout=60).run()
    assert not shown.exception
    assert "tiny" in html_of(shown)[-1]
    shown.file_uploader[0].set_value(
        [("a.png", encode(photo(1), "PNG"), "image/png"), ("b.jpg", b"<html>", "image/jpeg")]
    ).run()
    assert not shown.exception
    page_html = "".join(html_of(shown))
    assert "<h2>2 images: 1 " in page_html and "1 unreadable</h2>" in page_html
    assert "<b><bdi>b.jpg</bdi></b>: not an image" in page_html
    assert "so no figures are shown here" in page_html
    (expected,) = load_detector(runs=runs).predict([encode(photo(1), "PNG")])
    assert f"<strong>{percent(expected.probability)}</strong>" in page_html
    assert f"{expected.verdict[1:]}</h3>" in page_html
    threshold = shown.select_slider(key="threshold")
    threshold.set_value(0.05 if expected.probability < 0.5 else 0.95).run()
    assert f"{expected.verdict[1:]}</h3>" not in "".join(html_of(shown))


def test_the_page_without_a_checkpoint_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import streamlit
    from streamlit.testing.v1 import AppTest

    streamlit.cache_resource.clear()
    monkeypatch.setenv("DETECTOR_RUNS", str(tmp_path))
    shown = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert "no checkpoint below" in html_of(shown)[-1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "runs/a/weights.safetensors"),
         "weights.safetensors: Permission denied"),
        (KeyError("network"), "the checkpoint cannot be loaded (KeyError: 'network')"),
        (RuntimeError("[x](https://evil.example)"), "RuntimeError"),
    ],
)  # fmt: skip
def test_the_page_says_why_a_checkpoint_cannot_be_loaded(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import streamlit
    from streamlit.testing.v1 import AppTest

    def fails(*_arguments: object, **_keywords: object) -> None:
        raise error

    streamlit.cache_resource.clear()
    monkeypatch.setattr("page.detector.load_detector", fails)
    shown = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not shown.exception
    refused = html_of(shown)[-1]
    assert said in html.unescape(refused)
    assert "<a" not in refused


@pytest.mark.parametrize(
    "command",
    [train.main, evaluate.main, predict.main, serve,
     *sharding.commands.values(), *pipeline.commands.values(), *model.commands.values()],
    ids=lambda command: command.name,
)  # fmt: skip
def test_every_command_has_help_and_few_flags(command) -> None:
    """Options control where and how to run; the recipe controls training itself."""
    result = run(command, "--help")
    assert result.exit_code == 0
    for option in command.params:
        if option.param_type_name == "option":
            assert option.help, option.name
    flags = [p for p in command.params if p.param_type_name == "option" and p.name != "verbose"]
    # --catalog of evaluate.py was added to 18: it is that of `sharding build`, and no other option
    # could name a file whose [suites] and [reference] hold for all sets.
    budgets = {predict.main: 21, evaluate.main: 19, serve: 14, train.main: 13}
    budgets[model.commands["export"]] = 13
    assert len(flags) <= budgets.get(command, 8)


@pytest.mark.parametrize("group", [sharding, pipeline, model])
def test_the_help_of_a_group_has_whole_sentences(group) -> None:
    lines = run(group, "--help").stdout.partition("Commands:")[2].splitlines()
    assert len(lines) > 2 and not [line for line in lines if line.endswith("...")]


def test_the_demo_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """Compare a few of its images; the whole demo takes half a minute."""
    from sharding.demo.render import SOURCES, path_of, shots_of, write_shot

    shots = [shots_of(name)[i] for name in SOURCES for i in (1, -1)]
    for folder in ("one", "two"):
        for shot in shots[:: 1 if folder == "one" else -1]:
            path = path_of(tmp_path / folder, shot, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shot((tmp_path / folder, shot, 0))
    for path in (tmp_path / "one").rglob("*.*"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes()
        with Image.open(path) as image:
            assert min(image.size) >= 120
    shutil.rmtree(tmp_path / "one")
