"""Tests of the largest numbers of images: `cap` in a catalog, and `build --cap`."""

from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.format import open_shards
from tests.builders import encode, photo

CATALOG = """
[sets]
train = "train"
val = "val"

[sources.mine]
license = "x"
set = {{ train = 0.5, val = 0.5 }}
real = ["real"]
fake = ["fake"]
{cap}
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for label, name in enumerate(("real", "fake")):
        (folder / "mine" / name).mkdir(parents=True)
        for number in range(60):
            image = photo(100 * label + number, 48, 40)
            (folder / "mine" / name / f"{number}.png").write_bytes(encode(image, "PNG"))
    return folder


def build(raw: Path, folder: Path, cap: str, *arguments: str) -> dict[str, Counter]:
    """Build the source, and return the number of real (0) and fake (1) images of each set."""
    (folder / "catalog.toml").write_text(CATALOG.format(cap=cap))
    result = CliRunner().invoke(
        main,
        ["build", "--raw", str(raw), "--catalog", str(folder / "catalog.toml"),
         "--out", str(folder / "out"), "--jobs", "1", *arguments],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return {
        name: Counter(open_shards([folder / "out" / name]).column("label").tolist())
        for name in ("train", "val")
    }


def test_a_cap_takes_images_of_every_set(raw: Path, tmp_path: Path) -> None:
    """The images that are kept must not be those whose hash puts them into the first set."""
    counts = build(raw, tmp_path, "cap = { real = 20 }")
    assert counts["train"][0] + counts["val"][0] == 20
    assert min(counts["train"][0], counts["val"][0]) >= 4
    assert counts["train"][1] + counts["val"][1] == 60


def test_the_option_lowers_every_cap(raw: Path, tmp_path: Path) -> None:
    counts = build(raw, tmp_path, "cap = { real = 12 }", "--cap", "16")
    assert counts["train"][0] + counts["val"][0] == 12
    assert counts["train"][1] + counts["val"][1] == 16
