"""The band in words, and values of a calibration that a stranger's checkpoint may have."""

from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from model.network import build
from model.verdict import band_at, describe_band, left_out_sources
from tests.builders import TINY, small_recipe

IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "temperature is -1.0, expected a finite number above 0": {"temperature": -1.0},
    "threshold is 7, expected a number from 0 to 1": {"threshold": 7},
    "band is .*, the lower one first": {"calibration": {"band": [0.9, 0.1]}},
    "at_miss is .*, expected a list of pairs": {
        "calibration": {"band": [0.1, 0.9], "at_miss": [[0.05, "low"]]}
    },
    "sources is .*, expected the two error rates": {
        "calibration": {"band": [0.1, 0.9], "sources": {"ffhq": {"recall": 2}}}
    },
    "left_out is .*, expected temperature, band and the rates": {
        "calibration": {
            "band": [0.1, 0.9],
            "left_out": {"temperature": 0, "band": [0.1, 0.9], "sources": {}},
        }
    },
}


@pytest.mark.parametrize("said", IMPOSSIBLE)
def test_an_impossible_calibration_is_refused(tmp_path: Path, said: str) -> None:
    """The hashes of a stranger's folder fit what is in it."""
    folder = tmp_path / "step_0000001"
    checkpoint.save(
        folder,
        build(TINY, pretrained=False),
        recipe=small_recipe(),
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={"train": ["x"]}),
    )
    checkpoint.seal(folder, checkpoint.read_meta(folder) | IMPOSSIBLE[said])
    with pytest.raises(checkpoint.DamagedError, match=rf"meta\.json cannot be used: {said}"):
        checkpoint.load_network(folder)


def test_only_a_calibration_that_says_so_was_fitted_to_left_out_sources() -> None:
    calibration = {"band": [0.1, 0.9], "sources": {"a": {"recall": 0.5}}}
    left_out = calibration | {"method": "sources left out, pooled"}
    assert left_out_sources({"calibration": left_out}) == calibration["sources"]
    assert left_out_sources({"calibration": calibration}) == {}
    assert left_out_sources({"calibration": calibration | {"method": "validation"}}) == {}
    assert left_out_sources({"calibration": None}) == {}


def test_the_band_in_words() -> None:
    both = "no sign of AI below 0.25, likely AI from 0.765524, uncertain between"
    assert describe_band((0.25, 0.76552407)) == both
    assert describe_band((0.744, 0.744)) == "likely AI from 0.744"


def test_an_error_rate_takes_the_threshold_of_the_next_smaller_stored_rate() -> None:
    meta = {
        "calibration": {
            "at_fpr": [[0.01, 0.9], [0.05, 0.7], [0.1, 0.5]],
            "at_miss": [[0.01, 0.1], [0.05, 0.3], [0.1, 0.8]],
        }
    }
    assert band_at(meta, (0.2, 0.6), max_fpr=0.07) == (0.2, 0.7)
    assert band_at(meta, (0.2, 0.6), max_miss=0.07) == (0.3, 0.6)
    assert band_at(meta, (0.2, 0.6), 0.1, 0.1) == (0.5, 0.5)  # never the other way round
