"""The detector of the page: which one, or why there is none."""

import os
from pathlib import Path

import click
import streamlit as st

import console
from model import load_detector
from model.checkpoint import NoCheckpointError
from model.inference import signatures
from model.inference.detector import ImageDetector
from model.shipped.backbone import MissingError

# Where checkpoints are looked for: `DETECTOR_RUNS=demo/runs make app` shows the demo's. Not the
# newest run's best one: `DETECTOR_CHECKPOINT=runs/phase1 make app`.
RUNS, CHECKPOINT = "DETECTOR_RUNS", "DETECTOR_CHECKPOINT"


@st.cache_resource(show_spinner="Loading the detector")
def loaded_detector() -> ImageDetector:
    """The checkpoint, loaded once."""
    signatures.usual_trust_list()  # one that cannot be used is said at once
    return load_detector(folder_in(CHECKPOINT), runs=folder_in(RUNS) or Path("runs"))


def why_not(error: Exception) -> str:
    """Why there is no detector, and what whoever runs the page has to do."""
    if isinstance(error, MissingError):
        there = "in the folder of this program, then reload this page"
        return f"This page has no detector yet: {error} {there}."
    if isinstance(error, NoCheckpointError):
        return (
            f"This page has no detector: {str(error).partition(';')[0]}. Start it with {RUNS} or "
            f"{CHECKPOINT} as the folder of one that was trained, or without both to take the one "
            "that ships (python -m model fetch brings its weights)."
        )
    if isinstance(error, ValueError | OSError):
        return console.one_line(error)
    return f"the checkpoint cannot be loaded ({type(error).__name__}: {error})"


def folder_in(variable: str) -> Path | None:
    """The folder that a variable of the environment names, as options take one.

    Raises:
        ValueError: an address, or no folder.
    """
    value = os.environ.get(variable)
    try:
        return console.LocalPath(file_okay=False).convert(value, None, None) if value else None
    except click.BadParameter as error:
        raise ValueError(f"{variable}: {error.message}") from error
