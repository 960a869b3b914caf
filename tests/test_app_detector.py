"""Which detector the page takes, and what it says of it."""

import os
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import app
from model import load_detector
from model.checkpoint import NoCheckpointError, annotate, read_meta
from model.shipped import backbone
from model.shipped.backbone import MissingError
from tests.builders import JPEG, ROOT


def test_variables_take_a_folder_as_options_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    refused = {"s3://bucket/runs": "is an address", str(tmp_path / "fifo"): "a pipe or a device",
               str(tmp_path / "file"): "is a file"}  # fmt: skip
    for variable in ("DETECTOR_RUNS", "DETECTOR_CHECKPOINT"):
        for value, reason in refused.items():
            monkeypatch.setenv(variable, value)
            with pytest.raises(ValueError, match=f"{variable}: .*{reason}"):
                app.loaded_detector.__wrapped__()
            monkeypatch.delenv(variable)
    monkeypatch.setenv("DETECTOR_RUNS", f"file://{tmp_path}/none")
    with pytest.raises(ValueError, match=f"no checkpoint below {tmp_path}/none"):
        app.loaded_detector.__wrapped__()


def test_the_page_says_that_the_detector_ships(
    small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions: list[str] = []
    monkeypatch.setattr(app.st, "caption", captions.append)
    detector = load_detector(runs=small_runs)
    app.about(detector)
    assert len(captions) == 1 and captions[0].startswith("Model convnextv2\\_atto")
    monkeypatch.setattr(backbone, "DETECTORS", detector.checkpoint.parent)
    app.about(detector)
    assert captions[1] == "There is no trained run: this is step_0000001, which ships."
    monkeypatch.setenv("DETECTOR_CHECKPOINT", "small")  # it was named
    app.about(detector)
    assert len(captions) == 4


def test_what_speaks_against_the_detector_stays_on_the_page(
    small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = small_runs.glob("small/step_*")
    folder = shutil.copytree(own, tmp_path / "small" / own.name)
    data = read_meta(folder)["data"] | {"sources": ["a"], "synthetic_sources": ["a"]}
    annotate(folder, {"data": data})
    monkeypatch.setenv("DETECTOR_CHECKPOINT", str(folder))
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not page.exception
    banners = [banner.value for banner in page.warning]
    assert [text.partition("\\:")[0] for text in banners] == [
        "This detector was trained on synthetic images alone, which a program drew",
        "This detector is not calibrated",
    ]


def draw_image(folder: str, jpeg: bytes) -> None:
    """One image, and the slider; it runs as a page of its own."""
    import app
    from model import load_detector
    from model.inference.prediction import Prediction

    detector = load_detector(folder)
    prediction = Prediction(name="a", probability=0.4, verdict="uncertain")
    app.show_image(detector, None, app.Scored("a", prediction, preview=jpeg), "uncertain")
    app.show_threshold(detector)


def test_the_number_is_a_score_where_nothing_is_calibrated(small_runs: Path) -> None:
    (folder,) = small_runs.glob("small/step_*")
    page = AppTest.from_function(draw_image, kwargs={"folder": str(folder), "jpeg": JPEG}).run()
    assert not page.exception
    assert "Score for AI-generated: **40.0%**" in [text.value for text in page.markdown]
    captions = [text.value for text in page.caption]
    assert "A score is not a proof." in captions
    assert any(text.startswith("No sign of AI below") for text in captions)
    assert page.select_slider[0].label == "Say likely AI from this score on"


def test_a_missing_detector_says_what_to_do_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the page's own terms: it has no options, and whoever sees it may not be at its machine."""
    shutil.copytree(ROOT / "detectors/clip", tmp_path / "detectors/clip")
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path / "detectors")
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETECTOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(MissingError) as caught:
        app.loaded_detector.__wrapped__()
    said = app.why_not(caught.value)
    assert "type `python -m model fetch` in the folder of this program, then reload" in said
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path)
    with pytest.raises(NoCheckpointError) as none:
        app.loaded_detector.__wrapped__()
    assert "--checkpoint clip" in str(none.value)
    said = app.why_not(none.value)
    assert "DETECTOR_RUNS or DETECTOR_CHECKPOINT" in said and "python -m model fetch" in said
    assert "--" not in said
