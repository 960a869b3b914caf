"""Batches in, scores and checkpoints out; `load_detector` is the door for everyone else."""

from model.detector import ImageDetector, Prediction, load_detector
from sharding.decode import ImageFile

__all__ = ["ImageDetector", "ImageFile", "Prediction", "load_detector"]
