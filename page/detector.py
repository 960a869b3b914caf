"""Load the detector of the web page once for all visitors, or explain why it cannot be loaded.

Main entry: `loaded_detector()` takes nothing and returns the `ImageDetector` of the checkpoint, run
or shipped detector that the environment variable `DETECTOR_CHECKPOINT` (constant `CHECKPOINT`)
names, or else of the newest run in the folder of `DETECTOR_RUNS` (`RUNS`, default `runs/`), or else
the shipped one. Streamlit keeps it, so later calls return the same object.

Errors:

- `NoCheckpointError`: there is no run and no shipped detector.
- `MissingError`: the weights of the shipped detector are not downloaded.
- Another `ValueError`: the named detector does not exist, is damaged or of another version; a
  variable does not hold a folder of this machine; DETECTOR_RUNS is needed, and its folder does not
  exist; or the list of trusted signers (C2PA) is damaged, or missing where the variable
  DETECTOR_TRUST_LIST says.
- `OSError`: a file cannot be read.
- Anything else that a damaged file causes.

So catch `Exception` and pass it to `why_not(error)`, which returns a text for the page: the reason
and what to do.

`folder_in(variable)` takes the name of an environment variable and returns the folder in it as a
Path, or None if it is not set. It raises ValueError if the variable holds an address (such as
s3://...) or the path of something that is not a folder. The folder does not have to exist.
"""

import os
from pathlib import Path

import click
import streamlit as st

import cli
from escape import one_line
from model import load_detector
from model.c2pa import signatures
from model.checkpoint import CheckpointError, NoCheckpointError
from model.inference.detector import RUNS as DEFAULT_RUNS
from model.inference.detector import ImageDetector
from model.shipped.backbone import MissingError

# Environment variables. DETECTOR_RUNS is the runs folder (default runs/): its newest run is used.
# DETECTOR_CHECKPOINT names a checkpoint or run instead.
RUNS, CHECKPOINT = "DETECTOR_RUNS", "DETECTOR_CHECKPOINT"


@st.cache_resource(show_spinner="Loading the detector")
def loaded_detector() -> ImageDetector:
    """Load the detector once for all visitors.

    Raises:
        ValueError: a variable names no folder, or the detector cannot be loaded.
        OSError: a file cannot be read.
    """
    signatures.usual_trust_list()  # report an unusable trust list at once
    named, runs = folder_in(CHECKPOINT), folder_in(RUNS)
    try:
        return load_detector(named, runs=runs or DEFAULT_RUNS)
    except CheckpointError as error:
        if named or not runs or isinstance(error, NoCheckpointError):
            raise
        raise CheckpointError(f"{RUNS}: {error}") from error


def why_not(error: Exception) -> str:
    """Explain why there is no detector, and what the person who runs the page must do."""
    if isinstance(error, MissingError):
        there = "in the folder of this program, then reload this page"
        return f"This page has no detector yet: {error} {there}."
    if isinstance(error, NoCheckpointError):
        return (
            f"This page has no detector: {str(error).partition(';')[0]}. Set {RUNS} or "
            f"{CHECKPOINT} to the folder of a trained detector, or unset both to use the shipped "
            "detector (python -m model fetch downloads its weights)."
        )
    if isinstance(error, ValueError | OSError):
        return one_line(error)
    return f"the checkpoint cannot be loaded ({type(error).__name__}: {error})"


def folder_in(variable: str) -> Path | None:
    """Return the folder named by an environment variable, or None if the variable is not set.

    Raises:
        ValueError: the value is an address, or not a folder.
    """
    value = os.environ.get(variable)
    try:
        return cli.LocalPath(file_okay=False).convert(value, None, None) if value else None
    except click.BadParameter as error:
        raise ValueError(f"{variable}: {error.message}") from error
