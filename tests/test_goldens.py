"""Golden values are compared, and are written only with `write`."""

import json
from pathlib import Path

import pytest

from tests.goldens import Golden, check_printed

VALUES = {"losses": [0.5, 0.25], "flipped": True, "quality": 84}


def test_written_golden_values_compare_equal(tmp_path: Path) -> None:
    Golden(tmp_path, write=True).check("tiny", VALUES, rtol=1e-7)
    assert json.loads((tmp_path / "tiny.json").read_text()) == VALUES
    Golden(tmp_path).check("tiny", VALUES, rtol=1e-7)


def test_unchanged_golden_values_are_not_rewritten(tmp_path: Path) -> None:
    Golden(tmp_path, write=True).check("tiny", VALUES, rtol=1e-3)
    Golden(tmp_path, write=True).check("tiny", VALUES | {"losses": [0.50001, 0.25]}, rtol=1e-3)
    assert json.loads((tmp_path / "tiny.json").read_text()) == VALUES
    changed = VALUES | {"losses": [0.51, 0.25]}
    Golden(tmp_path, write=True).check("tiny", changed, rtol=1e-3)
    assert json.loads((tmp_path / "tiny.json").read_text()) == changed


@pytest.mark.parametrize(
    "change",
    [{"losses": [0.5, 0.2501]}, {"losses": [0.5]}, {"flipped": False}, {"quality": 85},
     {"more": 1}],
    ids=str,
)  # fmt: skip
def test_a_changed_value_fails_and_keeps_the_file(tmp_path: Path, change: dict) -> None:
    Golden(tmp_path, write=True).check("tiny", VALUES, rtol=1e-7)
    before = (tmp_path / "tiny.json").read_text()
    with pytest.raises(AssertionError, match=r"tiny\.json"):
        Golden(tmp_path).check("tiny", VALUES | change, rtol=1e-4)
    assert (tmp_path / "tiny.json").read_text() == before


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="make golden"):
        Golden(tmp_path).check("tiny", VALUES, rtol=1e-7)
    assert not list(tmp_path.iterdir())


def test_a_printed_probability_may_be_that_of_another_processor() -> None:
    shown = "      0.013  no sign of AI  photo.jpg\n(0.10312345, 2 images)\n"
    check_printed(shown.replace("0.013", "0.015"), shown)
    for wrong in (
        shown.replace("0.013", "0.016"), shown.replace("photo", "photos"),
        shown.replace("0.10312345", "0.10312346"), shown.replace("0.013", "-"),
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check_printed(wrong, shown)
