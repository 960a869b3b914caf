"""Shipped detectors in `detectors/`: complete files and cards, and a first prediction."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from model import checkpoint
from model.export.card import LIMITS, card_of
from model.shipped.backbone import DEFAULT_DETECTOR, spec_of
from tests.builders import ROOT, encode, photo

FOLDERS = sorted((ROOT / "detectors").iterdir())


def test_the_default_detector_exists() -> None:
    assert DEFAULT_DETECTOR in [folder.name for folder in FOLDERS]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_detector_is_complete_and_has_no_local_paths(folder: Path) -> None:
    meta = checkpoint.verify(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    assert list(load_file(folder / "weights.safetensors"))
    spec = spec_of(meta, str(folder))
    assert spec is not None and spec.files
    assert meta["calibration"]["sources"]
    for name in ("meta.json", "README.md"):
        text = (folder / name).read_text()
        assert not re.search(r"(?<![\w:/])/(home|root|tmp|work|data)/", text), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_is_what_the_code_writes(folder: Path) -> None:
    """Compare three sections of the card with the output of the command that writes it."""
    meta, written = checkpoint.read_meta(folder), (folder / "README.md").read_text()
    card = card_of(meta, None, {}, onnx=False)
    sections = re.compile(r"\n## (?:Known against it|Use|Limits)\n.*?(?=\n## )", re.S)
    assert sections.findall(written) == sections.findall(card)
    assert len(sections.findall(card)) == 3


def test_the_limits_of_a_card_name_no_kind_of_image_that_a_detector_may_have_learned() -> None:
    """Training sets may hold any of these kinds, as those of the shipped detector do."""
    assert "not made for partly\n  edited images.\n" in LIMITS
    for kind in ("drawing", "collage", "screenshot", "text", "illustration"):
        assert kind not in LIMITS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_states_the_figures_of_meta_json(folder: Path) -> None:
    meta, card = checkpoint.read_meta(folder), (folder / "README.md").read_text()
    assert f"likely AI-generated from {meta['calibration']['band'][1]:.3g} on" in card
    for name, rates in meta["calibration"]["sources"].items():
        share = rates["false_positive_rate" if rates["recall"] is None else "recall"]
        escaped = name.replace("_", r"\_")
        assert re.search(rf"\| {re.escape(escaped)}: .+ \(\w+\) \| [\d,]+ \| {share:.3f} ", card)


KINDS = {
    "Faces from Flickr": "ffhq", "3D renders": "renders_appleseed",
    "HDR wallpapers": "wallpapers_emanuil",
    "official portraits of US senators": "portraits_us_senate",
}  # fmt: skip
"""Words of the README -> source."""


def test_the_readme_names_the_real_images_that_are_called_ai_most_often() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    sentence = re.search(r"\. ([^.]+) are called AI most often", readme)
    assert sentence is not None
    named = {KINDS[words] for words in re.split(r", | and ", sentence[1])}
    calibration = checkpoint.read_meta(ROOT / "detectors" / DEFAULT_DETECTOR)["calibration"]
    sources = calibration["sources"].items()
    rates = {name: of["false_positive_rate"] for name, of in sources if of["recall"] is None}
    assert named == {*sorted(rates, key=rates.__getitem__)[-len(named) :]}


@pytest.mark.slow
def test_fetch_then_predict_prints_a_verdict(tmp_path: Path) -> None:
    """Skipped without a network, because the backbone must be downloaded."""
    command = [sys.executable, "-m", "model", "fetch"]
    fetched = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if fetched.returncode:
        pytest.skip(f"the backbone cannot be fetched: {fetched.stderr.strip().splitlines()[-1]}")
    (tmp_path / "photo.jpg").write_bytes(encode(photo(3, 640, 480)))
    done = subprocess.run(
        [sys.executable, "predict.py", str(tmp_path / "photo.jpg"), "--runs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"0\.\d{3}  (no sign of AI|uncertain|likely AI)", done.stdout), done.stdout
    assert f"{DEFAULT_DETECTOR}" in done.stderr + done.stdout
