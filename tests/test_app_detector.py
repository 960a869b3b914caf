"""Which detector the page takes, and what it says of it."""

import os
from pathlib import Path

import pytest

import app
from model import load_detector
from model.shipped import backbone


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
