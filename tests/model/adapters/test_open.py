"""Names of detectors that are addresses."""

from pathlib import Path

import pytest

from model.adapters.detector import DetectorError
from model.adapters.open import Opening, as_checkpoint, load_any, open_other


@pytest.mark.parametrize("name", ["s3://b/run", "https://h/m.onnx", "https://h/det.py"])
def test_an_address_of_a_detector_is_refused_as_it_was_typed(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is an address; expected a path on this machine"):
        load_any(name, None, Opening(trust=name.endswith(".py")))


@pytest.mark.parametrize(("name", "known"), [("hf://a/b", "hf:a/b"), ("timm:", "timm:OWNER/NAME")])
def test_a_model_of_the_hub_is_not_written_as_an_address(name: str, known: str) -> None:
    with pytest.raises(DetectorError, match=f"^{name} names no model; write {known}, or a folder$"):
        load_any(name, None, Opening())


def test_a_detector_may_be_named_by_a_file_address() -> None:
    assert as_checkpoint("file:///runs/x", None, Opening()) == Path("/runs/x")
    with pytest.raises(DetectorError, match=r"^there is no file /runs/x\.py") as refused:
        open_other("file:///runs/x.py", Opening(trust=True))
    assert "file:" not in str(refused.value)
