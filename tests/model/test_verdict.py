"""The band in words, and values of a calibration that a stranger's checkpoint may have."""

from pathlib import Path
from typing import Any

import pytest

from checked import checked
from model import checkpoint
from model.network import build
from model.shipped.calibration import Calibrated
from model.verdict import LeftOut, band_at, describe_band, left_out_rates, left_out_sources
from tests.builders import TINY, small_recipe

RATES = {"reals": 9, "fakes": 0, "false_positive_rate": 0.2, "recall": None, "uncertain": 0.1}

IMPOSSIBLE: list[tuple[str, dict[str, Any], str]] = [
    # said, changes of the calibration, changes of the meta
    ("temperature takes a finite number above 0, got -1.0", {}, {"temperature": -1.0}),
    ("threshold takes a number from 0 to 1, got 7", {}, {"threshold": 7}),
    ("calibration takes an object, got 5", {}, {"calibration": 5}),
    ("band takes two numbers from 0 to 1, the lower one first, got", {"band": [0.9, 0.1]}, {}),
    ("band.1 takes a number from 0 to 1, got null", {"band": [0.9, None]}, {}),
    ('at_miss.0.1 takes a number from 0 to 1, got "low"', {"at_miss": [[0.05, "low"]]}, {}),
    ("roc.1.2 takes a number from 0 to 1, got 2", {"roc": [[0, 1, 1], [1, 0, 2]]}, {}),
    ("reals takes a whole number from 0 to 10**12, got -1", {"reals": -1}, {}),
    ('reals takes a whole number from 0 to 10**12, got "many"', {"reals": "many"}, {}),
    ('fitted_on takes a list, got "val"', {"fitted_on": "val"}, {}),
    ("sources.ffhq.recall takes a num", {"sources": {"ffhq": RATES | {"recall": 2}}}, {}),
    ("false_positive_rate is missing", {"sources": {"ffhq": {"recall": 0.5}}}, {}),
    (
        "left_out.temperature takes a finite number above 0, got 0",
        {"left_out": {"temperature": 0, "band": [0.1, 0.9], "sources": {}}},
        {},
    ),
]


@pytest.mark.parametrize(("said", "changes", "of_meta"), IMPOSSIBLE)
def test_an_impossible_calibration_is_refused(
    tmp_path: Path, said: str, changes: dict[str, Any], of_meta: dict[str, Any]
) -> None:
    """The hashes of a stranger's folder fit what is in it."""
    folder = tmp_path / "step_0000001"
    checkpoint.save(
        folder,
        build(TINY, pretrained=False),
        recipe=small_recipe(),
        state=None,
        record=checkpoint.Record(step=1, epoch=1, metrics={}, selection=0.5, data={"train": ["x"]}),
    )
    meta = checkpoint.read_meta(folder) | {"calibration": {"band": [0.1, 0.9]} | changes} | of_meta
    checkpoint.seal(folder, meta)
    with pytest.raises(checkpoint.DamagedError, match=r"meta\.json cannot be used: ") as caught:
        checkpoint.load_network(folder)
    assert said in str(caught.value)


def test_only_a_calibration_that_says_so_was_fitted_to_left_out_sources() -> None:
    calibration = {"band": [0.1, 0.9], "sources": {"a": {"recall": 0.5}}}
    left_out = calibration | {"method": "sources left out, pooled"}
    assert left_out_sources({"calibration": left_out}) == calibration["sources"]
    assert left_out_sources({"calibration": calibration}) == {}
    assert left_out_sources({"calibration": calibration | {"method": "validation"}}) == {}
    assert left_out_sources({"calibration": None}) == {}


@pytest.mark.parametrize("more", [{}, {"before": {}, "threshold_at": "mine", "sources": None}])
def test_a_calibration_may_have_only_its_band(more: dict[str, Any]) -> None:
    """People write such files, and every key but the band may be missing."""
    values = {"temperature": 1.0, "threshold": 0.5, "calibration": {"band": [0.3, 0.6]} | more}
    assert checked(Calibrated, values) == values | {"calibration": {"band": (0.3, 0.6)} | more}


def test_a_band_at_another_temperature_is_a_number() -> None:
    """A stranger's temperature may be huge."""
    kept = {"temperature": 1e308, "band": [0.2, 1 - 1e-16], "sources": {"a": RATES}}
    meta = {"temperature": 1.0, "calibration": {"band": [0.1, 0.9], "left_out": kept}}
    assert left_out_rates(meta) == LeftOut({"a": RATES}, (0.0, 1.0))


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
