"""Every code block of `docs/python.md` runs and prints the output shown below it."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.checkpoint import annotate, read_meta
from model.shipped import backbone
from model.shipped.backbone import cached_path
from model.verdict import CALIBRATION_KEYS
from tests.builders import ROOT
from tests.goldens import check_printed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHIPPED = ROOT / "detectors" / backbone.DEFAULT_DETECTOR


def blocks(page: str) -> Iterator[tuple[str, str]]:
    """Yield each Python block and the output block that follows it."""
    yield from re.findall(r"```python\n(.*?)```\n+```\n(.*?)```", page, re.S)


def printed(page: str) -> Iterator[tuple[str, str]]:
    """Run the blocks; yields the actual output and the shown output of each."""
    names: dict[str, object] = {}
    for code, expected in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "docs/python.md", "exec"), names)
        yield out.getvalue(), expected


def without_scores(text: str) -> str:
    """Remove everything that depends on the weights: detector name, probabilities, verdicts."""
    text = re.sub(r"'[^']+ [0-9a-f]{8}'", "WHICH", text)
    text = re.sub(r"'(no sign of AI|uncertain|likely AI)', probability=0\.\d{3}", "SCORE", text)
    return re.sub(r"^\d$|\((32|48|448), .*", "NUMBER", text, flags=re.M)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert len(list(blocks(text))) == text.count("```python") >= 8
    return text


def test_every_code_block_prints_the_shown_output(
    page: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Uses random weights and the calibration of the shipped detector."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "runs" / "tiny" / "step_0000007")
    shipped = json.loads((SHIPPED / "meta.json").read_text(encoding="utf-8"))
    data = read_meta(folder)["data"] | {"titles": shipped["data"]["titles"]}
    annotate(folder, {"data": data} | {key: shipped[key] for key in CALIBRATION_KEYS})
    for actual, expected in printed(page):
        assert without_scores(actual) == without_scores(expected)


@pytest.mark.slow
def test_the_shipped_detector_prints_the_shown_output(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = json.loads((SHIPPED / "meta.json").read_text(encoding="utf-8"))
    if not any(cached_path(file["sha256"]).is_file() for file in meta["backbone"]["files"]):
        pytest.skip("its backbone is not on this machine")
    monkeypatch.setattr(backbone, "DETECTORS", SHIPPED.parent)
    for actual, expected in printed(page):
        check_printed(actual, expected)
