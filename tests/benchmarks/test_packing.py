"""Speeds of `benchmarks.packing` are those of images, not of the noise of two starts."""

from pathlib import Path

from click.testing import CliRunner

from benchmarks.packing import LIMIT_NAME, LOOP_NAME, main, rates_of, row_of


def test_a_time_that_does_not_grow_with_the_images_is_no_speed() -> None:
    assert rates_of({"all": [3.0, 2.0], "few": [1.0, 1.0]}, 400) == [200, 400]
    assert rates_of({"all": [3.0, 1.0], "few": [1.0, 1.0]}, 400) == []
    assert rates_of({"all": [3.0, 0.9], "few": [1.0, 1.0]}, 400) == []


def test_a_row_has_the_figures_that_were_measured() -> None:
    rates = {"build": [200.0, 400.0], LOOP_NAME: [100.0], LIMIT_NAME: []}
    row = row_of("build", rates, [2.0, 2.0], 2**20)
    assert row == ["build", 300, "200-400", "3.00", None, "1.3", "23", "1"]
    assert row_of(LIMIT_NAME, rates, [2.0], 2**20) == [LIMIT_NAME, *[None] * 6, "1"]


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--images", "2", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 2 and "2 is not in the range x>=400" in result.stderr
