"""Batches in, scores and checkpoints out; `load_detector` is the door for everyone else."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.inference.detector import load_detector

__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    """Import `load_detector` when it is asked for: `predict.py --onnx` runs where torch is not."""
    if name != "load_detector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from model.inference.detector import load_detector

    return load_detector
