"""One export for all tests of the ONNX files."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from model.__main__ import main
from tests.builders import encode, photo

KINDS = [("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"quality": 80}), ("BMP", {})]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dozen images of several sizes, and one file that is not an image."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        kind, options = KINDS[number % len(KINDS)]
        pixels = photo(number, 40 + 23 * number, 250 - 17 * number)
        (folder / f"{number:02d}.{kind.lower()}").write_bytes(encode(pixels, kind, **options))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return folder


@pytest.fixture(scope="session")
def exported(tiny_checkpoint: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export with the command, and return the folder with the ONNX files."""
    out = tmp_path_factory.mktemp("exported") / "onnx"
    result = CliRunner().invoke(
        main,
        ["export", "--onnx", "--checkpoint", str(tiny_checkpoint), "--images", str(images),
         "--out", str(out)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "1 unreadable, not compared; first: broken.jpg" in result.output
    return out
