"""The calibration of a detector of others, kept in `<runs>/<its name>/calibration.json`, for its
own files stay as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import console
from model.adapters.detector import DetectorError, OtherDetector
from storage import write_text

CALIBRATION_FILE = "calibration.json"
KEYS = ("temperature", "threshold", "calibration")


def calibration_path(detector: OtherDetector, runs: Path) -> Path:
    """Where the calibration of a detector is kept."""
    return runs / detector.folder_name / CALIBRATION_FILE


def keep_calibration(detector: OtherDetector, runs: Path, entries: Mapping[str, Any]) -> Path:
    """Write what was fitted (`Calibration.entries`), and the identity of what it was fitted to."""
    path = calibration_path(detector, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"detector": detector.meta["detector"], **{key: entries[key] for key in KEYS}}
    write_text(path, json.dumps(content, indent=1) + "\n")
    return path


def with_calibration(detector: OtherDetector, runs: Path) -> OtherDetector:
    """The detector with the calibration that was kept of it, if it is of the same files; where they
    have changed since, a warning says that it is left out.

    Raises:
        DetectorError: the file is damaged.
    """
    path = calibration_path(detector, runs)
    if not path.exists():
        return detector
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        fitted = {key: kept[key] for key in KEYS}
        fitted_to = kept["detector"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DetectorError(
            f"{path} is damaged ({error}); remove it, or calibrate again"
        ) from error
    if fitted_to != detector.meta["detector"]:
        console.log.warning(
            "%s was fitted to another version of %s and is left out; calibrate again",
            path, detector.checkpoint,
        )  # fmt: skip
        return detector
    return replace(detector, meta={**detector.meta, **fitted})
