"""Run the Python code of docs/shards.md on a set that mixes JPEG and PNG."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builders import ROOT, build_all, encode, photo

BLOCKS = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/shards.md").read_text(encoding="utf-8"), re.DOTALL
)

CATALOG = """
[sets]
phase1 = "train"
[sources.tiny_genimage]
license = "x"
set = "phase1"
real = ["real"]
fake = ["fake"]
"""


@pytest.mark.parametrize("block", BLOCKS, ids=["webdataset", "datasets", "timm", "by row"])
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_reads_a_set(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "datasets import" in block:
        pytest.importorskip("datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for kind, image_format in (("real", "JPEG"), ("fake", "PNG")):
        folder = tmp_path / "tiny_genimage" / kind
        folder.mkdir(parents=True)
        for number in range(3):
            data = encode(photo(number + 10 * (kind == "fake"), 40, 40), image_format)
            (folder / f"{number}.{image_format.lower()}").write_bytes(data)
    (tmp_path / "catalog.toml").write_text(CATALOG)
    build_all(tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    if "image" in names:  # of the last sample, or of the first row
        assert names["image"]
