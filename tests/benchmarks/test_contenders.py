"""`benchmarks.contenders` explains its arguments, although only `benchmarks.loader` calls it, and
measures speeds within epochs.
"""

import pytest
from click.testing import CliRunner

from benchmarks.contenders import images_per_s_within, main


def test_help_and_missing_arguments_are_no_traceback() -> None:
    assert "Time the loader NAME" in CliRunner().invoke(main, ["--help"]).stdout
    result = CliRunner().invoke(main, ["pil"])
    assert result.exit_code == 2 and "Missing argument 'PLACE'" in result.stderr


def test_the_start_of_a_later_epoch_is_not_the_speed_within_it() -> None:
    """A backend that builds a pipeline for each epoch seemed a quarter slower than it is."""
    waits = [9, 1, 1, 5, 1, 1, 7, 1, 1]
    moments = [float(sum(waits[: step + 1])) for step in range(9)]
    assert images_per_s_within(moments, [10] * 9, 3) == pytest.approx(10)
    assert images_per_s_within(moments, [10] * 9, 1) == pytest.approx(80 / 18)
    assert images_per_s_within([1.0], [10], 1) == 0
