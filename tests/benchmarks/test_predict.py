"""The time of `predict.py` beside that of the network alone, by `benchmarks.predict`."""

import json
from pathlib import Path

from click.testing import CliRunner

from benchmarks.predict import main


def test_a_checkpoint_is_measured(small_runs: Path, tmp_path: Path) -> None:
    run, out = small_runs / "small", tmp_path / "figures.json"
    options = ["--checkpoint", str(run), "--device", "cpu", "--images", "2", "--rounds", "1"]
    done = CliRunner().invoke(main, [*options, "--json", str(out)])
    assert done.exit_code == 0, done.output
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == [str(run)]
    assert all(runs[str(run)][way][0]["seconds"] > 0 for way in ("bare", "predict"))


def test_a_checkpoint_is_no_network_with_random_weights(small_runs: Path) -> None:
    options = ["--checkpoint", str(small_runs), "--network", "mobilenetv2_100"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 2
    assert "--checkpoint cannot be combined with --network" in done.output
