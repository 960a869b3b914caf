"""The code of `docs/export.md` prepares images as `predict.py` does."""

import itertools
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imaging.decode import decode
from model import load_detector
from model.inference.onnx_detector import preprocess
from pipeline.preprocess import FILTERS, Preprocess
from tests.builders import ROOT, encode, photo

SIZES = [
    (32, 32), (33, 47), (75, 100), (100, 75), (40, 400), (127, 64), (128, 65), (150, 151),
    (255, 256), (257, 300), (640, 480), (481, 639), (1023, 700),
]  # fmt: skip

# The smallest mistake in the rule, a side that is not rounded, gave 0.03.
PROBABILITY = 0.01


@pytest.fixture
def program(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the block in a folder with `detector.onnx` and a photograph; returns its names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detector.onnx").symlink_to(exported / "detector.onnx")
    (tmp_path / "photo.jpg").write_bytes(encode(photo(0)))
    text = (ROOT / "docs/export.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/export.md", "exec"), names)
    assert names["probability"].shape == (1,) and names["logits"].shape == (1, 2)
    return names


def files(folder: Path) -> list[Path]:
    """Write photographs of all sizes, every third one turned by EXIF."""
    paths = [folder / f"{width}x{height}.png" for width, height in SIZES]
    for index, (path, (width, height)) in enumerate(zip(paths, SIZES, strict=True)):
        turned = Image.Exif()
        if index % 3 == 0:
            turned[0x0112] = 6
        path.write_bytes(encode(photo(index, width, height), "PNG", exif=turned))
    return paths


def test_the_code_for_other_programs_gives_the_probabilities_of_predict(
    program: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    paths = files(tmp_path)
    pixels = np.stack([program["pixels_of"](path) for path in paths])
    probabilities, _ = program["session"].run(None, {"images": pixels})
    expected = [one.probability for one in load_detector(tiny_checkpoint).predict(paths)]
    assert np.ptp(expected) > PROBABILITY
    assert np.abs(probabilities - expected).max() < PROBABILITY


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("sizes", [(64, 72), (48, 48), (50, 77)])
def test_the_code_for_other_programs_gives_the_same_pixels(
    program: dict[str, Any], tmp_path: Path, detail: bool, sizes: tuple[int, int]
) -> None:
    """Of every setting: the metadata of the file decides."""
    for name, path in zip(itertools.cycle(FILTERS), files(tmp_path), strict=False):
        settings = Preprocess(
            crop_size=sizes[0], resize_size=sizes[1], interpolation=name, detail_crop=detail
        )
        program.update(settings=asdict(settings), size=sizes[0])
        program["filter"] = Image.Resampling[name.upper()]
        expected = preprocess(decode(path.read_bytes()), settings)
        assert np.array_equal(program["pixels_of"](path), expected), (path.name, name)
