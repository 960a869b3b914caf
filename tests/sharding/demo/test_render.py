"""`make demo` as a newcomer types it: it must end well, and it must really learn."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.builders import ROOT


@pytest.mark.slow
def test_the_demo_learns_and_phase_2_gains(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "demo", f"DEMO={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (
        json.loads((tmp_path / f"report-phase{phase}/report.json").read_text())["sets"]
        for phase in (1, 2)
    )
    for name, metrics in after["evalgen"]["generators"].items():
        assert metrics["auroc"] > 0.9, name
    gain = after["val-phase2"]["overall"]["auroc"] - before["val-phase2"]["overall"]["auroc"]
    assert gain > 0.05
    assert before["val"]["overall"]["auroc"] > 0.95
    assert "quarantined: street/real/camera-a/00000.jpg" in done.stdout
    end = "\n".join(done.stdout.strip().splitlines()[-40:])
    assert "demo-phase1" in end
    assert f"checkpoints and curves: {tmp_path / 'runs'}" in end
