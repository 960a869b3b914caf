"""Network, training, evaluation and inference. Main entry: `load_detector()`, which opens a
detector for prediction; training is started by `model.training.run.train()`.
"""

from typing import TYPE_CHECKING, Any

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
