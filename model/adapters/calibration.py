"""Store and load the calibration of a third-party detector.

The calibration is a dict with three keys (`CALIBRATION_KEYS` of `model/verdict.py`): `temperature`;
`threshold`, for the decision; and `calibration`, the band of probabilities that are "uncertain",
with details.

Main entries: `keep_calibration(detector, runs, entries)` writes the file
`<runs>/<detector.folder_name>/calibration.json`, with the identity of the detector. It makes the
folder if needed, and returns the path of the file, as `calibration_path(detector, runs)` does. It
raises `OSError` if the file cannot be written, and `KeyError` if a key is missing.

- `detector`: an `OtherDetector`, from `open_other()` of `model/adapters/open.py`.
- `runs`: the `Path` of the folder of all runs.
- `entries`: the dict, from `Calibration.entries()` of `model/calibration/fit.py`.

`with_calibration(detector, runs)` returns a copy of the detector with the stored values. If there
is no such file, it returns the detector unchanged. If the file was fitted to another version of the
detector (other weights, revision or fake labels), it logs a warning and also returns it unchanged.
It raises `DetectorError` if `calibration.json` is damaged, has a value of another type or out of
its range, or cannot be read (`PermissionError` if its folder may not be opened). The detector's own
files are not changed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

import console
from checked import checked
from escape import text_fault
from model.adapters.detector import DetectorError, OtherDetector
from model.shipped.calibration import CalibrationEntry, Share, Temperature
from model.verdict import CALIBRATION_KEYS
from storage import parse_json, read_text, write_text

CALIBRATION_FILE = "calibration.json"


class KeptCalibration(TypedDict):
    """Content of the file: a calibration, and the detector that it was fitted to."""

    temperature: Temperature
    threshold: Share
    calibration: CalibrationEntry
    detector: dict[str, Any]
    """As `detector` in the meta of the detector."""


def calibration_path(detector: OtherDetector, runs: Path) -> Path:
    """Return the path of a detector's calibration file."""
    return runs / detector.folder_name / CALIBRATION_FILE


def keep_calibration(detector: OtherDetector, runs: Path, entries: Mapping[str, Any]) -> Path:
    """Write a calibration (`Calibration.entries`) with the identity of its detector; return the
    path.
    """
    path = calibration_path(detector, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "detector": detector.meta["detector"],
        **{key: entries[key] for key in CALIBRATION_KEYS},
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def with_calibration(detector: OtherDetector, runs: Path) -> OtherDetector:
    """Return the detector with its stored calibration, if there is one. A calibration of other
    weights or of another file is ignored, with a warning.

    Raises:
        DetectorError: the calibration file is damaged, or a value in it is impossible.
    """
    path = calibration_path(detector, runs)
    if not path.exists():
        return detector
    try:
        kept = checked(KeptCalibration, parse_json(read_text(path)))
    except (OSError, ValueError) as error:
        fault = str(error.strerror) if isinstance(error, OSError) else text_fault(error)
        raise DetectorError(
            f"{path} is damaged ({fault}); remove it, or calibrate again"
        ) from error
    if kept["detector"] != detector.meta["detector"]:
        console.log.warning(
            "%s was fitted to another version of %s and is ignored; calibrate again",
            path, detector.checkpoint,
        )  # fmt: skip
        return detector
    fitted = {key: value for key, value in kept.items() if key in CALIBRATION_KEYS}
    return replace(detector, meta={**detector.meta, **fitted})
