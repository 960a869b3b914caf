"""Batches in, scores and checkpoints out; `load_detector` is the door for everyone else."""

from model.detector import ImageDetector, ImageFile, Prediction, load_detector

__all__ = ["ImageDetector", "ImageFile", "Prediction", "load_detector"]
