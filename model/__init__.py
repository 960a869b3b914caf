"""Batches in, scores and checkpoints out; `load_detector` is the door for everyone else."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.detector import ImageDetector, load_detector
    from model.prediction import Prediction
    from sharding.decode import ImageFile

_HOMES = {
    "ImageDetector": "model.detector",
    "ImageFile": "sharding.decode",
    "Prediction": "model.prediction",
    "load_detector": "model.detector",
}

__all__ = ["ImageDetector", "ImageFile", "Prediction", "load_detector"]


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: `predict.py --onnx` must run where torch is not."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
