"""A Python file as a detector: loading it, and its use in predict.py and evaluate.py."""

import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import evaluate
import predict
from model.adapters.calibration import keep_calibration
from model.adapters.detector import DetectorError, OtherDetector, logits_from, meta_of, output_name
from model.adapters.open import Opening, kind_of, load_any, open_other
from model.adapters.python_file import open_file
from model.calibration.fit import calibrate
from model.checkpoint import CheckpointError, find
from model.distributed import DistEnv
from model.evaluation import scoring
from model.evaluation.scores import read_scores
from model.evaluation.scoring import score_shards
from model.score import Scores
from model.verdict import probability
from pipeline.read import ShardReader
from sharding.format import open_shards
from storage import sha256_of
from tests.builders import ROOT, encode, photo

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]

DETECTOR = """
import numpy as np

def predict(images):
    return [float(np.asarray(image).mean() / 255) for image in images]
"""

LOGIT_ERROR = 1e-6
"""Tolerance of a probability that was computed from a float32 logit."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bright.py"
    path.write_text(DETECTOR)
    return path


def test_the_ten_lines_of_the_page_run_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/detectors.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.splitlines()) == 10
    net = timm.create_model("resnet18", num_classes=1)
    save_file(net.state_dict(), tmp_path / "their_detector.safetensors")
    (tmp_path / "ten.py").write_text(code)
    (tmp_path / "photo.jpg").write_bytes(encode(photo(1)))
    monkeypatch.chdir(tmp_path)
    done = run(predict.main, "photo.jpg", "--detector", "ten.py", "--trust")
    assert done.exit_code == 0, done.output
    assert "photo.jpg" in done.stdout and "Warning" not in done.output


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hf:a/b", "hf"), ("timm:x", "timm"), ("a/b.PY", "file"), ("b.ONNX", "onnx"),
     ("runs/x", "checkpoint"), ("clip", "checkpoint"), ("s3:x", "checkpoint")],
)  # fmt: skip
def test_the_kind_of_a_detector_comes_from_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind
    with pytest.raises(DetectorError, match="names no model"):
        kind_of("hf:")


@pytest.mark.parametrize("name", ["hf:owner/name", "timm:x", "a/b.PY", "detector.onnx"])
def test_another_kind_of_detector_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    assert kind_of(name) != "checkpoint"
    with pytest.raises(CheckpointError, match=r"neither a checkpoint.* open it with --detector, "):
        find(tmp_path, Path(name))


def test_a_program_runs_only_when_it_is_trusted(file: Path, tmp_path: Path) -> None:
    file.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(DetectorError, match="--trust"):
        open_file(file, trust=False)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DetectorError, match="no function `predict`"):
        open_file(file, trust=True)
    assert (tmp_path / "ran").exists()


def test_a_suffix_in_capitals_is_a_program_too(file: Path) -> None:
    capitals = file.rename(file.with_suffix(".PY"))
    detector = open_other(str(capitals), Opening(trust=True))
    assert detector.predict(np.full((32, 32, 3), 51, np.uint8)).probability == pytest.approx(0.2)


def test_options_without_a_meaning_are_refused(file: Path) -> None:
    for opening, name, said in (
        (Opening(trust=True), "hf:a/b", "--trust is for a Python file"),
        (Opening(trust=True, fake_labels=["x"]), str(file), "--fake-label is for"),
    ):
        with pytest.raises(DetectorError, match=said):
            open_other(name, opening)
    for opening in (Opening(trust=True), Opening(fake_labels=["x"])):
        with pytest.raises(DetectorError, match="is for a third-party detector"):
            load_any(None, None, opening)
    with pytest.raises(DetectorError, match="give one of them"):
        load_any("clip", Path("runs"), Opening())
    with pytest.raises(DetectorError, match="names nothing"):
        load_any(" ", None, Opening())
    with pytest.raises(DetectorError, match="--heatmap is for a checkpoint"):
        load_any(str(file), None, Opening(trust=True), heatmap=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [0.5]", r"returned an array of shape \(1,\)"),
        ("return [1.5] * len(images)", "returned the value 1.5"),
        ("return 'text'", "returned str"),
        ("return [object()] * len(images)", "expected 2 numbers"),
        ("raise KeyError('gpu')", "failed on 2 images: KeyError: 'gpu'"),
        ("import sys; sys.exit(0)", "failed on 2 images: SystemExit: 0"),
        (
            "import torch; return torch.ones(2, requires_grad=True)",
            r"returned Tensor \(RuntimeError: Can't call numpy.* requires grad.*expected 2 numbers",
        ),
    ],
)
def test_returned_values_are_checked(file: Path, body: str, said: str) -> None:
    file.write_text(f"def predict(images):\n    {body}\n")
    detector = open_file(file, trust=True)
    with pytest.raises(DetectorError, match=said):
        detector.score([Image.new("RGB", (8, 8))] * 2)


def test_predict_gets_upright_rgb_and_broken_files_are_reported(file: Path, tmp_path: Path) -> None:
    file.write_text(
        "def predict(images):\n"
        "    assert all(image.mode == 'RGB' for image in images)\n"
        "    widths = [image.width for image in images]\n"
        "    return [float('nan') if width == 33 else width / 1000 for width in widths]\n"
    )
    detector = open_file(file, trust=True)
    turned = Image.fromarray(photo(3, 40, 90))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    broken, narrow = encode(photo(1))[:60], photo(4)[:, :33]
    first, second, third = detector.predict([tmp_path / "turned.jpg", broken, narrow])
    assert first.probability == turned.height / 1000 != turned.width / 1000
    assert second.verdict == "unreadable" and second.error
    assert third.verdict == "unreadable" and "not a finite number" in third.error


def test_a_file_may_define_dataclasses_and_pickle_them(file: Path) -> None:
    file.write_text(
        "from __future__ import annotations\nimport pickle\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Answer:\n    value: float\n"
        "def predict(images):\n"
        "    return [pickle.loads(pickle.dumps(Answer(0.25))).value for _ in images]\n"
    )
    detector = open_file(file, trust=True)
    assert detector.predict(np.zeros((32, 32, 3), np.uint8)).probability == pytest.approx(0.25)


def test_modules_in_the_same_folder_can_be_imported(file: Path) -> None:
    (file.parent / "its_own_helper.py").write_text("VALUE = 0.25\n")
    file.write_text("import its_own_helper as h\ndef predict(i): return [h.VALUE] * len(i)\n")
    assert open_file(file, trust=True).predict(photo(1)).probability == 0.25


def test_the_identity_depends_on_the_content_of_the_file(file: Path) -> None:
    first = open_file(file, trust=True).identity
    assert first == open_file(file, trust=True).identity and first.startswith(str(file))
    file.write_text(DETECTOR + "# changed\n")
    assert open_file(file, trust=True).identity != first
    assert open_file(file, trust=True, threshold=0.3).identity != first


def test_the_recorded_hash_is_that_of_the_code_that_ran(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's cache of compiled files compares only the size and the whole second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for value in ("0.25", "0.75"):
        file.write_text(f"def predict(images): return [{value}] * len(images)\n")
        os.utime(file, (1e9, 1e9))
        detector = open_file(file, trust=True)
        assert detector.predict(photo(1)).probability == float(value)
        assert detector.meta["detector"]["sha256"] == sha256_of(file)


def test_predict_in_every_format_and_resume(file: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(7):
        (photos / f"{index}.png").write_bytes(encode(photo(index), "PNG"))
    ask = ("--detector", file, "--trust", "--batch-size", 4)
    whole = tmp_path / "whole.jsonl"
    result = run(predict.main, photos, *ask, "--out", whole)
    assert result.exit_code == 0, result.output
    assert "is not calibrated" in result.stderr
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    for row in lines:
        mean = np.asarray(Image.open(row["path"])).mean() / 255
        assert row["probability"] == pytest.approx(mean, abs=0)
        assert row["checkpoint"].startswith(f"{file} ")
    for output in ("table", "csv"):
        shown = run(predict.main, photos, *ask, "--format", output)
        assert shown.exit_code == 0 and "3.png" in shown.output
    part = tmp_path / "part.jsonl"
    partial = part.with_name("part.jsonl.partial")
    partial.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3]))
    result = run(predict.main, photos, *ask, "--out", part, "--resume")
    assert result.exit_code == 0, result.output
    assert part.read_bytes() == whole.read_bytes()
    file.write_text(DETECTOR + "# another\n")
    shutil.copy(whole, partial)
    part.unlink()
    assert run(predict.main, photos, *ask, "--out", part, "--resume").exit_code == 2


def test_files_of_one_name_have_different_outputs(file: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "detector.py").write_bytes(file.read_bytes())
    names = [
        open_file(tmp_path / folder / "detector.py", trust=True, threshold=None).folder_name
        for folder in ("a", "b")
    ]
    assert names == ["file-a-detector.py", "file-b-detector.py"]


def test_the_name_of_an_output_folder_keeps_what_tells_files_apart(tmp_path: Path) -> None:
    def name_of(kind: str, *parts: str) -> str:
        path = tmp_path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return output_name(kind, path.name, path)

    assert name_of("onnx", "one", "onnx", "detector") == "onnx-one-detector"
    assert name_of("onnx", "two", "onnx", "detector") == "onnx-two-detector"
    assert name_of("file", "a b", "тест.py") == "file-a-b-тест.py"
    assert name_of("file", "a b", "कि.py") != name_of("file", "a b", "का.py")
    assert len(name_of("file", "x" * 200, "y" * 200).encode()) <= 255
    assert output_name("hf", "owner/name", Path("owner/name")) == "hf-owner-name"


ABSTAINS = """
import numpy as np

def predict(images):
    means = [float(np.asarray(image).mean() / 255) for image in images]
    return [mean if mean > {least} else float("nan") for mean in means]
"""


def test_an_evaluation_counts_the_images_without_a_verdict(
    file: Path, data: Path, tmp_path: Path
) -> None:
    ask = ("--shards", "val", "--detector", file, "--trust", "--data", data)
    file.write_text(ABSTAINS.format(least=0.5))
    part = run(evaluate.main, *ask, "--out", tmp_path / "part")
    assert part.exit_code == 0, part.output
    report = json.loads((tmp_path / "part/report.json").read_text())["sets"]["val"]
    lost = len(report["unreadable"])
    assert lost > 1 and report["overall"]["count"] > 1
    assert "the detector gives no verdict on it" in report["unreadable"][0]
    counted = f"; {lost} of {lost + report['overall']['count']} images without a score"
    assert part.stdout.splitlines()[0].endswith(counted)
    file.write_text(ABSTAINS.format(least=1))
    whole = run(evaluate.main, *ask, "--out", tmp_path / "whole")
    assert whole.exit_code == 1
    assert "Error: no image of val has a score; the first: val:" in whole.stderr
    assert (tmp_path / "whole/report.html").exists()
    again = run(evaluate.main, "--scores", tmp_path / "whole/scores.parquet")
    assert again.exit_code == 1


def test_evaluate_report_and_comparison_of_a_python_file(
    file: Path, data: Path, tmp_path: Path
) -> None:
    ask = ("--data", data, "--runs", tmp_path / "runs")
    detector = ("--detector", file, "--trust", *ask)
    result = run(evaluate.main, "--shards", "val", "--robustness", 3, *detector)
    assert result.exit_code == 0, result.output
    out = tmp_path / f"runs/file-{file.parent.name}-bright.py/evaluation/val"
    assert sorted(path.name for path in out.iterdir()) == [
        "figures.csv", "report.html", "report.json", "robustness.csv", "scores.parquet",
        "speed.json",
    ]  # fmt: skip
    scores = read_scores(out / "scores.parquet")
    assert scores.evaluation["detector"]["kind"] == "file"
    assert len(scores.evaluation["detector"]["sha256"]) == 64
    report = json.loads((out / "report.json").read_text())
    rows = report["sets"]["val"]["robustness"]["perturbations"]
    assert rows[0]["name"] == "original" and rows[0]["images"] == 6
    speed = json.loads((out / "speed.json").read_text())
    assert speed["images"] == len(scores) and speed["images_per_s"] > 0
    before = (out / "report.json").read_bytes()
    assert run(evaluate.main, "--scores", out / "scores.parquet", *ask[:2]).exit_code == 0
    assert (out / "report.json").read_bytes() == before
    compared = run(evaluate.main, "compare", out, out)
    assert compared.exit_code == 0, compared.output
    refused = run(evaluate.main, "--shards", "val", "--features", tmp_path, *detector)
    assert refused.exit_code == 1 and "leave --features out" in refused.stderr


def test_scores_do_not_depend_on_the_number_of_ranks(
    file: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, detector = open_shards([data / "val"]), open_file(file, trust=True)
    whole = score_shards(detector, shards)
    parts: list[object] = []
    for rank in range(3):
        monkeypatch.setattr(scoring, "all_gather_object", lambda _dist, value: [value])
        monkeypatch.setattr(scoring, "join_ranks", lambda values: parts.append(values[0]))
        score_shards(detector, shards, DistEnv(rank, 3, 0))
    monkeypatch.undo()
    joined = scoring.join_ranks(parts)
    assert np.array_equal(joined.samples, whole.samples)
    assert np.array_equal(joined.logits, whole.logits)
    assert np.array_equal(joined.labels, whole.labels) and joined.failures == whole.failures


def test_a_calibration_is_stored_and_used(
    file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Opening(trust=True, runs=tmp_path / "runs")
    ask = ("--detector", file, "--trust", "--data", data, "--runs", opening.runs)
    refused = run(evaluate.main, "calibrate", "--shards", "old", *ask)
    assert refused.exit_code == 1 and "split train" in refused.stderr
    labels = open_shards([data / "old"]).column("label").astype(np.int64)
    logits = np.random.default_rng(0).normal(4 * labels - 2, 3).astype(np.float32)
    scores = Scores(np.arange(len(labels)), labels, logits, {})
    monkeypatch.setattr(scoring, "score_shards", lambda *_: pytest.fail("images were scored"))
    refused = run(evaluate.main, "calibrate", "--shards", "val", *ask)
    assert refused.exit_code == 1 and "calibration needs at least 20 of each" in refused.stderr
    # The set val is too small, and brightness does not separate its classes.
    monkeypatch.setattr("model.calibration.calibrate.check_validation_sets", lambda _folders: None)
    monkeypatch.setattr(scoring, "score_shards", lambda *_: scores)
    result = run(evaluate.main, "calibrate", "--shards", "old", *ask)
    assert result.exit_code == 0, result.output
    detector = open_other(str(file), opening)
    assert detector.meta["calibration"] and not detector.notices
    assert detector.meta["temperature"] != 1
    shards = open_shards([data / "val"])
    logits = score_shards(detector, shards).logits
    in_evaluation = probability(logits, detector.meta["temperature"])
    pixels = map(ShardReader(shards).pixels, range(len(shards)))
    # To the last bit: a threshold is the next number above the score of an image.
    assert [one.probability for one in detector.predict(pixels)] == in_evaluation.tolist()
    file.write_text(DETECTOR + "# another\n")
    assert not open_other(str(file), opening).meta["calibration"]


FITTED = {"band": [0.25, 0.5]}
KEPT = {"temperature": 2, "threshold": 0.5, "calibration": FITTED}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": "2"}, 'temperature takes a finite number above 0, got "2"'),
        ({"temperature": 0}, "temperature takes a finite number above 0, got 0"),
        ({"temperature": float("inf")}, "temperature takes a finite number above 0, got Infinity"),
        ({"temperature": True}, "temperature takes a finite number above 0, got true"),
        ({"temperature": 10**400}, "a number in it has more than 300 digits"),
        ({"threshold": float("nan")}, "threshold takes a number from 0 to 1, got NaN"),
        ({"threshold": 1.5}, "threshold takes a number from 0 to 1, got 1.5"),
        ({"calibration": None}, "calibration takes an object, got null"),
        ({"calibration": {}}, "calibration.band is missing"),
        ({"calibration": FITTED | {"band": [0.5, 0.25]}}, "the lower one first, got .0.5, 0.25"),
        ({"calibration": FITTED | {"band": [-0.5, 0.5]}}, "band.0 takes a number from 0 to 1"),
        ({"calibration": FITTED | {"band": ["a", 0.5]}}, 'band.0 takes .* from 0 to 1, got "a"'),
        ({"calibration": FITTED | {"at_fpr": [[0.1, "a"]]}}, 'at_fpr.0.1 takes .*, got "a"'),
        ({"calibration": FITTED | {"at_miss": 5}}, "at_miss takes a list, got 5"),
        ({"calibration": FITTED | {"sources": ["a"]}}, "sources takes an object, got"),
        (
            {"calibration": FITTED | {"sources": {"a": {}}}},
            "sources.a.false_positive_rate is missing",
        ),
        (
            {"temperature": {"a": None}, "threshold": None},
            'temperature takes .* 0, got {"a": null}',
        ),
    ],
)
def test_impossible_values_of_a_calibration_are_refused(
    file: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    opening = Opening(trust=True, runs=tmp_path / "runs")
    plain = open_file(file, trust=True)
    keep_calibration(plain, opening.runs, {**KEPT, **change})
    with pytest.raises(DetectorError, match=rf"calibration\.json is damaged \(.*{said}") as caught:
        open_other(str(file), opening)
    assert str(caught.value).endswith("; remove it, or calibrate again")
    assert "\n" not in str(caught.value)


def test_a_calibration_that_is_not_an_object_is_refused(file: Path, tmp_path: Path) -> None:
    opening = Opening(trust=True, runs=tmp_path / "runs")
    path = keep_calibration(open_file(file, trust=True), opening.runs, KEPT)
    assert open_other(str(file), opening).predict(photo(1)).probability < 0.5
    damaged = {
        "{": "Expecting property name", "": "the file is empty", "[]": "it holds list, expected an",
        "{}": "temperature is missing", "[" * 100_000: "it is nested too deeply",
    }  # fmt: skip
    for content, said in damaged.items():
        path.write_text(content)
        with pytest.raises(DetectorError, match=rf"calibration\.json is damaged \({said}"):
            open_other(str(file), opening)


def test_thresholds_next_to_0_and_1_are_accepted(file: Path, tmp_path: Path) -> None:
    """A threshold is fitted just above a score, so above 1 if the score is 1."""
    labels = np.repeat([0, 1], 1000)
    logits = 3.0 * (2 * labels - 1)
    logits[[0, -1]] = logits_from(np.array([1.0, 0.0]))
    fitted = calibrate(labels, logits)
    assert fitted.at_fpr[0][1] > 1 and fitted.at_miss[0][1] < 0
    opening = Opening(trust=True, runs=tmp_path / "runs")
    keep_calibration(open_file(file, trust=True), opening.runs, fitted.entries({}))
    assert open_other(str(file), opening).at_rates(max_fpr=0.001).band[1] == fitted.at_fpr[0][1]


def test_logits_of_0_and_1_are_finite_and_extreme() -> None:
    logits = logits_from(np.array([0.0, 1e-12, 0.5, 1 - 1e-12, 1.0]))
    assert np.isfinite(logits).all() and (np.diff(logits) > 0).all() and logits[2] == 0
    assert np.isnan(logits_from(np.array([np.nan])))[0]
    given = np.linspace(0, 1, 1001)
    back = 1 / (1 + np.exp(-logits_from(given).astype(np.float32).astype(float)))
    assert np.abs(back - given).max() < LOGIT_ERROR


def test_its_function_is_called_by_one_thread_at_a_time() -> None:
    """It may be anybody's code, so it need not be thread-safe."""
    running: list[int] = []
    others: list[Future] = []

    class Alone:
        fixed_batches = False

        def prepare(self, image: Image.Image) -> int:
            return image.width

        def score(self, prepared: Sequence[int]) -> np.ndarray:
            running.append(1)
            if not others:
                others.append(thread.submit(second.predict, photo(2)))
                wait(others, timeout=0.1)
            assert len(running) == 1
            running.clear()
            return np.full(len(prepared), 0.5)

    detector = OtherDetector(Path("file:x"), Alone(), meta_of("file", "x"), None, "")
    second = replace(detector, asked=(0.4, 0.4))
    with ThreadPoolExecutor(1) as thread:
        verdicts = [detector.predict(photo(1)).verdict, others[0].result().verdict]
    assert verdicts == ["likely AI", "likely AI"]
