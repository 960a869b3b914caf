"""The detector of the page: how it is chosen, and what the page says about it."""

import os
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from model import load_detector
from model.checkpoint import NoCheckpointError, annotate, read_meta
from model.shipped import backbone
from model.shipped.backbone import MissingError
from page.about import detector_line
from page.detector import loaded_detector, why_not
from tests.browser import html_of
from tests.builders import JPEG, ROOT


def test_environment_variables_take_only_local_folders(
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
                loaded_detector.__wrapped__()
            monkeypatch.delenv(variable)
    monkeypatch.setenv("DETECTOR_RUNS", f"file://{tmp_path}/none")
    with pytest.raises(ValueError, match=f"DETECTOR_RUNS: there is no folder {tmp_path}/none with"):
        loaded_detector.__wrapped__()
    monkeypatch.setenv("DETECTOR_CHECKPOINT", str(tmp_path / "other"))  # then no run is chosen
    with pytest.raises(ValueError, match=f"{tmp_path}/other"):
        loaded_detector.__wrapped__()


def test_the_page_says_that_it_uses_the_shipped_detector(
    small_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = load_detector(runs=small_runs)
    assert detector_line(detector).startswith("Model convnextv2_atto")
    monkeypatch.setattr(backbone, "DETECTORS", detector.checkpoint.parent)
    assert detector_line(detector).startswith(
        "There is no trained run, so this is the shipped detector step_0000001."
    )
    monkeypatch.setenv("DETECTOR_CHECKPOINT", "small")  # it was named
    assert detector_line(detector).startswith("Model convnextv2_atto")


def test_notices_about_the_detector_stay_on_the_page(
    small_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = small_runs.glob("small/step_*")
    folder = shutil.copytree(own, tmp_path / "small" / own.name)
    data = read_meta(folder)["data"] | {"sources": ["a"], "synthetic_sources": ["a"]}
    annotate(folder, {"data": data})
    monkeypatch.setenv("DETECTOR_CHECKPOINT", str(folder))
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert not page.exception
    (banner,) = (html for html in html_of(page) if 'class="warning"' in html)
    parts = (
        "This detector was trained on synthetic images alone, which a program drew",
        "This detector is not calibrated",
    )
    assert 0 < banner.index(parts[0]) < banner.index(parts[1])
    assert any("Not known: the error rates" in html for html in html_of(page))


def draw_image(folder: str, jpeg: bytes) -> None:
    """Draw one image and the slider; Streamlit runs this function as a page."""
    from model import load_detector
    from model.inference.prediction import Prediction
    from page.cost import show_threshold
    from page.draw import show_image
    from page.scored import Scored

    detector = load_detector(folder)
    prediction = Prediction(name="a", probability=0.4, verdict="uncertain")
    result = Scored("a", prediction, preview=jpeg, size=(90, 70))
    show_image(detector, None, result, "uncertain", 2)
    show_threshold(detector)


def test_without_a_calibration_the_number_is_called_a_score(small_runs: Path) -> None:
    (folder,) = small_runs.glob("small/step_*")
    page = AppTest.from_function(draw_image, kwargs={"folder": str(folder), "jpeg": JPEG}).run()
    assert not page.exception
    html = "".join(html_of(page))
    assert "Score for AI-generated: <strong>40.0%</strong>" in html
    assert "A score is not a proof." in html and "No sign of AI below" in html
    assert "its numbers are scores, not probabilities" in html and "Of 100 fakes" not in html
    assert page.select_slider[0].label == "Threshold: likely AI at or above this score"


def draw_slider(folder: str) -> None:
    """Draw the slider of a detector whose threshold is next to a step of its ROC curve."""
    from dataclasses import replace

    import streamlit as st

    from model import load_detector
    from page.cost import at_slider, show_threshold

    detector = load_detector(folder)
    calibration = {
        "fitted_on": ["val"], "sources": {}, "reals": 50, "fakes": 40,
        "roc": [(0.1, 0.5, 1.0), (0.8998, 0.04, 0.6), (0.9, 0.0, 0.2)], "band": [0.3, 0.8998],
    }  # fmt: skip
    meta = detector.meta | {"calibration": calibration, "threshold": 0.8998}
    detector = replace(detector, meta=meta)
    show_threshold(detector)
    st.text(f"band {at_slider(detector).band}")


def test_a_rerun_does_not_move_the_threshold(small_runs: Path) -> None:
    """Streamlit finds the option of the slider by its label."""
    (folder,) = small_runs.glob("small/step_*")
    page = AppTest.from_function(draw_slider, kwargs={"folder": str(folder)}).run()
    assert not page.exception
    assert page.select_slider[0].options == ["10%", "89.98%", "90%"]
    before = [page.text[0].value, *html_of(page)]
    page.run()
    assert [page.text[0].value, *html_of(page)] == before
    page.select_slider[0].set_value(0.9).run()
    assert page.text[0].value == "band (0.9, 0.9)"
    said = "".join(html_of(page))
    assert "No sign of AI below 90%, likely AI from 90% on." in said
    assert "The detector's default threshold is 89.98%." in said.replace("&#39;", "'")


def test_a_missing_detector_says_what_to_do_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names no command options, because the page has none."""
    shutil.copytree(ROOT / "detectors/clip", tmp_path / "detectors/clip")
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path / "detectors")
    monkeypatch.setenv("DETECTOR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "runs").mkdir()
    monkeypatch.setenv("DETECTOR_RUNS", str(tmp_path / "runs"))
    with pytest.raises(MissingError) as caught:
        loaded_detector.__wrapped__()
    said = why_not(caught.value)
    assert "type `python -m model fetch` in the folder of this program, then reload" in said
    monkeypatch.setattr(backbone, "DETECTORS", tmp_path)
    with pytest.raises(NoCheckpointError) as none:
        loaded_detector.__wrapped__()
    assert "--checkpoint clip" in str(none.value)
    said = why_not(none.value)
    assert "DETECTOR_RUNS or DETECTOR_CHECKPOINT" in said and "python -m model fetch" in said
    assert "--" not in said
