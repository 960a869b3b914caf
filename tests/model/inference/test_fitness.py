"""Notices: known reasons not to rely on a detector, from its meta, and in `predict.py`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import predict
from model import checkpoint, load_detector
from model.inference import fitness
from model.inference.fitness import notices, score_word
from tests.builders import CALIBRATION, ROOT, encode, photo

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def meta_of(calibration: dict[str, Any] | None = CALIBRATION, **data: object) -> dict[str, Any]:
    return {"calibration": calibration, "data": {"train": ["x"], "replay": [], **data}}


def rates(fpr: float | None, recall: float | None) -> dict[str, Any]:
    return {"false_positive_rate": fpr, "recall": recall, "reals": 9, "fakes": 9, "uncertain": 0.0}


def test_a_fit_detector_has_no_notice() -> None:
    assert notices(meta_of()) == []
    assert notices({"calibration": CALIBRATION}) == []  # a meta without `data`
    assert score_word(meta_of()) == "probability"
    assert fitness.disclaimer(meta_of()) == "a probability is not a proof"


def test_synthetic_training_sources_give_a_notice() -> None:
    (notice,) = notices(meta_of(sources=["a", "b"], synthetic_sources=["a", "b"]))
    assert notice.kind == "synthetic" and "on synthetic images alone" in notice.text
    (notice,) = notices(meta_of(sources=["a", "b"], synthetic_sources=["b"]))
    assert notice.kind == "synthetic" and "in part on synthetic images" in notice.text
    assert "(b)" in notice.text
    assert notices(meta_of(sources=["a", "b"], synthetic_sources=[])) == []


def test_without_calibration_the_number_is_a_score() -> None:
    (notice,) = notices(meta_of(None))
    assert notice.kind == "uncalibrated" and "scores, not probabilities" in notice.text
    assert score_word(meta_of(None)) == "score"
    assert fitness.score_label(meta_of(None)) == "score for AI-generated"
    assert fitness.disclaimer(meta_of(None)) == "a score is not a proof"


def test_bad_sources_are_listed_worst_first() -> None:
    sources = {
        "good": rates(0.10, None), "bad": rates(0.2, None), "worse": rates(0.31, None),
        "seen": rates(None, 0.10), "half": rates(None, 0.081), "unseen": rates(None, 0.0),
    }  # fmt: skip
    called, missed = notices(meta_of(CALIBRATION | {"sources": sources}))
    assert called.kind == missed.kind == "known"
    assert "of new kinds AI: 31 % of worse; 20 % of bad (" in called.text
    assert "of new kinds: under 1 % of unseen; 8 % of half (" in missed.text


def test_sources_that_the_head_has_seen_give_no_notice() -> None:
    known = CALIBRATION | {"sources": {"a": rates(0.5, None)}}
    assert len(notices(meta_of(known))) == 1
    assert notices(meta_of(known | {"method": "validation sets by source, pooled"})) == []


def test_of_many_bad_sources_only_the_worst_are_named() -> None:
    sources = {f"kind{n}": rates(0.2 + n / 100, None) for n in range(6)}
    (notice,) = notices(meta_of({**CALIBRATION, "sources": sources}))
    assert (
        "25 % of kind5; 24 % of kind4; 23 % of kind3; 22 % of kind2; and over 10 % of 2 more kinds"
        in (notice.text)
    )


def test_a_source_is_called_by_its_title() -> None:
    sources = {"ffhq": rates(0.3, None), "own": rates(0.2, None), "avatars": rates(None, 0.05)}
    titles = {"ffhq": "faces of Flickr users", "avatars": "avatars by StyleGAN2"}
    called, missed = notices(meta_of(CALIBRATION | {"sources": sources}, titles=titles))
    assert "AI: 30 % of faces of Flickr users; 20 % of own (" in called.text
    assert "kinds: 5 % of avatars by StyleGAN2 (" in missed.text


def test_known_weaknesses_are_quoted_and_the_most_serious_notice_is_first() -> None:
    meta = meta_of(None, known_against=["an audit said so"], sources=["a"], synthetic_sources=["a"])
    assert [notice.kind for notice in notices(meta)] == ["synthetic", "known", "uncalibrated"]
    assert notices(meta)[1].text == "an audit said so"


def test_the_shipped_detector_lists_its_false_alarms() -> None:
    meta = json.loads((ROOT / "detectors/clip/meta.json").read_text(encoding="utf-8"))
    called, missed = notices(meta)
    assert "48 % of faces from photographs on Flickr; 30 % of 3D scenes modeled" in called.text
    assert "under 1 % of surreal landscapes by Midjourney, 2026; under 1 % of stones" in missed.text
    assert called.text.endswith("(each measured with that source left out of training, at the "
                                "threshold 0.747)")  # fmt: skip


ROC = [[0.2, 0.5, 0.9], [0.4, 0.3, 0.8], [0.6, 0.1, 0.7], [0.8, 0.001, 0.2]]


@pytest.mark.parametrize(
    ("band", "said"),
    [
        ((0.6, 0.6), "in use, 0.6, 10 % of the real images and 70 % of the fakes of the calibrat"),
        ((0.5, 0.5), "0.5, 20 % of the real images and 75 % of the fakes of the calibration are"),
        ((0.2, 0.8), "0.8, under 1 % of the real images and 20 % of the fakes of the calibration "
                     "are likely AI; below 0.2, 50 % and 10 % are no sign of AI"),
    ],
)  # fmt: skip
def test_another_threshold_has_the_rates_of_the_calibration(
    band: tuple[float, float], said: str
) -> None:
    meta = meta_of(CALIBRATION | {"roc": ROC})
    (notice,) = notices(meta, band)
    assert notice.kind == "threshold" and said in notice.text
    assert notices(meta, (0.3, 0.6)) == notices(meta) == []  # the band of the calibration itself
    assert notices(meta_of(), band) == []  # not known
    assert notices(meta, (0.1, 0.6)) == notices(meta, (0.4, 0.9)) == []  # beyond the curve's ends


def test_predict_names_the_threshold_of_each_rate(uncalibrated: Path) -> None:
    known = {"method": "sources left out, pooled", "sources": {"faces": rates(0.4, None)}}
    checkpoint.annotate(uncalibrated, {"calibration": CALIBRATION | known | {"roc": ROC}})
    lines = ask(uncalibrated, "--threshold", 0.5).stderr.splitlines()
    assert sum("40 % of faces (each" in line and "threshold 0.6)" in line for line in lines) == 1
    assert sum("at the threshold in use, 0.5, 20 %" in line for line in lines) == 1
    assert "threshold in use" not in ask(uncalibrated).stderr


def ask(folder: Path, *arguments: object) -> Result:
    """Run `predict.py` with a checkpoint on one photograph."""
    image = folder.parent / "photo.png"
    image.write_bytes(encode(photo(1), "PNG"))
    command = [str(image), "--checkpoint", str(folder), *map(str, arguments)]
    return CliRunner().invoke(predict.main, command)


@pytest.fixture
def uncalibrated(small_runs: Path, tmp_path: Path) -> Path:
    (folder,) = small_runs.glob("small/step_*")
    return shutil.copytree(folder, tmp_path / "small" / folder.name)


def test_predict_prints_notices_before_the_first_verdict(
    uncalibrated: Path, tmp_path: Path
) -> None:
    data = checkpoint.read_meta(uncalibrated)["data"]
    known = {"sources": ["a"], "synthetic_sources": ["a"], "known_against": ["an audit said so"]}
    checkpoint.annotate(uncalibrated, {"data": data | known})
    result = ask(uncalibrated)
    lines = [line for line in result.stderr.splitlines() if line]
    said = [notice.text for notice in load_detector(uncalibrated).notices]
    assert len(said) == 3 and [line for line in lines if line in said] == said
    assert lines[-1] == "a score is not a proof"
    heading, row = result.stdout.splitlines()
    assert heading.split() == ["score", "verdict", "file"]
    assert heading.index("verdict") == row.index(row.split()[1])
    # Programs read the column `probability`, so its name stays the same.
    result = ask(uncalibrated, "--format", "csv")
    assert result.stdout.startswith("path,probability,") and "not a proof" not in result.stderr
    out = tmp_path / "x.txt"
    assert ask(uncalibrated, "--out", out).exit_code == 0
    assert out.read_text().splitlines() == [heading, row]


def test_predict_with_a_calibrated_detector_says_probability(uncalibrated: Path) -> None:
    checkpoint.annotate(uncalibrated, {"calibration": CALIBRATION})
    result = ask(uncalibrated)
    assert result.stdout.splitlines()[0].split() == ["probability", "verdict", "file"]
    assert result.stderr.splitlines()[-1] == "a probability is not a proof"
    assert not load_detector(uncalibrated).notices and "detector is not" not in result.stderr
