"""Check the model card of checkpoints whose `meta.json` has only what a detector needs."""

from pathlib import Path

from model import checkpoint
from model.export.card import card_of
from model.export.hub import sources_of
from model.export.license import license_of
from tests.builders import CALIBRATION, ROOT


def test_a_stranger_may_record_no_training_sets(tiny_checkpoint: Path) -> None:
    meta = checkpoint.read_meta(tiny_checkpoint) | {"data": None}
    left_out = {"faces": {"reals": 9, "fakes": 0, "false_positive_rate": 0.2, "recall": None}}
    meta["calibration"] = CALIBRATION | {
        "sources": {"faces": left_out["faces"] | {"uncertain": None}}
    }
    meta["recipe"] = {key: value for key, value in meta["recipe"].items() if key != "run"}
    assert sources_of(meta, None) == {} and license_of(meta).text
    card = card_of(meta, None, {}, onnx=False)
    assert "Trained on: no set of images." in card
    assert "| faces (real) | 9 | 0.200 (0.053 to 0.526) | - |" in card


def test_a_calibration_may_lack_its_counts(tiny_checkpoint: Path) -> None:
    """A stranger's meta.json may have only the band; it was a KeyError."""
    meta = checkpoint.read_meta(tiny_checkpoint)
    rates = {"false_positive_rate": 0.125, "recall": None}
    of_sources = {"method": "sources left out, pooled", "sources": {"alpha": rates}}
    for calibration in ({"band": [0.3, 0.6]}, {"band": [0.3, 0.6]} | of_sources):
        meta["calibration"] = calibration
        text = card_of(meta, None, {}, onnx=False)
        assert "? (? real, ? fake images)" in text
    assert "| alpha (real) | ? | 0.125 | - |" in text


def test_the_card_of_the_detector_that_ships_has_the_table_of_the_code() -> None:
    folder = ROOT / "detectors/clip"
    tables = []
    for card in (
        card_of(checkpoint.read_meta(folder), None, {}, onnx=False),
        (folder / "README.md").read_text(encoding="utf-8"),
    ):
        section = card.split("## Sources left out of training\n\n")[1].split("\n\n## ")[0]
        tables.append(section.split("\n\n")[1])
    assert tables[0] == tables[1]
