"""Tests of `make demo`: the commands succeed, and the demo network learns."""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from model.checkpoint import read_meta
from model.inference.fitness import notices
from sharding.catalog import BUILT_IN, read_catalog
from sharding.demo import render
from tests.builders import ROOT


def test_every_source_of_the_demo_is_marked_as_synthetic(tmp_path: Path) -> None:
    """The meta.json of a checkpoint that is trained on them contains this mark."""
    entries = [render.SETS, *map(render.catalog_entry, render.SOURCES)]
    (tmp_path / "catalog.toml").write_text("\n".join(entries), encoding="utf-8")
    sources = read_catalog([tmp_path / "catalog.toml"]).sources
    assert sources.keys() == render.SOURCES.keys()
    assert all(source.synthetic for source in sources.values())
    assert not any(source.synthetic for source in read_catalog([BUILT_IN]).sources.values())


def test_a_demo_of_another_seed_is_not_mixed_in(tmp_path: Path) -> None:
    """The suffix of a file depends on the seed, so files of both would stay."""
    shots = render.shots_of("street")
    earlier = [{render.path_of(tmp_path, shot, seed) for shot in shots} for seed in (0, 1)]
    other = min(earlier[0] - earlier[1])
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x")
    (other.parent / ".DS_Store").touch()
    with pytest.raises(OSError, match=rf"{other} is not of .* --seed; remove {tmp_path}/raw, or"):
        render.make_demo(tmp_path, seed=1)
    assert [path for path in tmp_path.rglob("[!.]*") if path.is_file()] == [other]


def test_an_image_of_the_demo_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    shot = render.Shot("street", render.FAKE, 1, "nearest")
    path = render.path_of(tmp_path, shot, 0)
    path.parent.mkdir(parents=True)
    path.symlink_to("elsewhere")  # a file written in place would appear there
    render.write_shot((tmp_path, shot, 0))
    assert list(path.parent.iterdir()) == [path] and not path.is_symlink()
    with Image.open(path) as image:
        image.load()


@pytest.mark.slow
def test_the_demo_learns_and_phase_2_improves_it(tmp_path: Path) -> None:
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
    runs = sorted((tmp_path / "runs").glob("*/step_*"))
    assert {notices(read_meta(folder))[0].kind for folder in runs} == {"synthetic"}
    assert f"checkpoints and curves: {tmp_path / 'runs'}" in end
