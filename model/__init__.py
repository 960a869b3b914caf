"""Open a detector for prediction from Python.

Main entry: `load_detector(checkpoint, ...)` (all arguments are optional) is imported from
`model.inference.detector` on first use. It returns an `ImageDetector`, whose `predict()` takes
images and returns a `Prediction` (name, probability of AI-generated, verdict) for each. Training
starts at `model.training.run.train()`, evaluation at `model.evaluation.run.evaluate()`.
"""

from typing import TYPE_CHECKING, Any

import installed  # noqa: F401  # refuses Windows, before libraries are loaded

if TYPE_CHECKING:
    from model.inference.detector import load_detector

__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    """Import `load_detector` on first use: `predict.py --onnx` also runs where torch is not
    installed.
    """
    if name != "load_detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model.inference.detector import load_detector

    return load_detector
