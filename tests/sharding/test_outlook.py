"""Tests that a build says before it decodes which validation sets are too small to calibrate on."""

from pathlib import Path

import pytest

from model.calibration.fit import FEWEST
from sharding.build import build
from sharding.catalog import Catalog, read_catalog
from sharding.outlook import warn_of_small
from sharding.scan import find_sources

TEXT = """
[sets]
mine = "train"
mine-val = "val"
mine-test = "test"
[sources.mine]
license = "x"
set = { mine = 0.6, mine-val = 0.2, mine-test = 0.2 }
real = ["real"]
fake = ["fake"]
"""


def put(tmp_path: Path, real: int, fake: int) -> Catalog:
    """Write empty files: the listing reads only their names."""
    for kind, count in (("real", real), ("fake", fake)):
        (tmp_path / "raw/mine" / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (tmp_path / f"raw/mine/{kind}/{number}.png").touch()
    (tmp_path / "c.toml").write_text(TEXT)
    return read_catalog([tmp_path / "c.toml"])


def test_a_small_validation_set_is_told_before_anything_is_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was told after the training."""
    catalog = put(tmp_path, 300, 40)

    def stop(what: str, _total: int) -> None:
        raise InterruptedError(what)

    with pytest.raises(InterruptedError, match="decoding"):
        build(catalog, tmp_path / "raw", tmp_path / "out", jobs=1, progress=stop)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("set mine-val will have about ")
    assert f"fake images; a calibration needs {FEWEST} of each: add images, or raise" in line
    counts = [int(word) for word in line.split() if word.isdigit()]
    assert counts[0] > FEWEST > counts[1] > 0


@pytest.mark.parametrize(
    ("real", "fake", "only"), [(300, 300, []), (300, 40, ["mine"]), (300, 40, ["mine-test"])]
)
def test_a_set_that_is_large_enough_or_not_built_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, real: int, fake: int, only: list[str]
) -> None:
    catalog = put(tmp_path, real, fake)
    scan = find_sources(catalog, tmp_path / "raw", tmp_path / "out")
    warn_of_small(catalog, scan, only)
    assert not caplog.records
