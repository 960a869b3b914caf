"""`benchmarks.hostile` detects crashes, hangs and unexplained differences, and nothing else."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import hostile
from benchmarks.mutations import mutations, seeds
from imaging.decode import decode


def folder_of(tmp_path: Path, count: int) -> Path:
    (tmp_path / "in").mkdir()
    for name, data in [*seeds().items(), *mutations(count)]:
        (tmp_path / "in" / f"{name}.{name.partition('-')[0]}").write_bytes(data)
    return tmp_path / "in"


@pytest.mark.slow
def test_damaged_files_break_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(hostile.main, [str(folder_of(tmp_path, 60))])
    assert done.exit_code == 0, done.output
    assert "verify: 0 faults" in done.output
    assert "unexplained" not in done.output


def test_a_child_over_its_time_or_memory_limit_is_killed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 1)
    _, ended, _ = hostile.run_child("decode", folder, tmp_path, 0, 0.0, 2**40)
    assert ended == "hangs"
    _, ended, _ = hostile.run_child("decode", folder, tmp_path, 0, 60.0, 2**20)
    assert "GB of memory" in ended
    lines, ended, peak = hostile.run_child("decode", folder, tmp_path, 0, 60.0, 2**40)
    assert not ended and peak > 2**20
    assert [line["file"] for line in lines if "file" in line] == list(range(len(seeds()) + 1))


@pytest.mark.slow
def test_a_crash_is_reported(tmp_path: Path) -> None:
    _, ended, _ = hostile.run_child("load pil", tmp_path, tmp_path, 0, 60.0, 2**40)
    assert ended.startswith("crash, exit code 1: ")


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_first_frame_is_compared_although_a_later_frame_is_damaged(tmp_path: Path) -> None:
    """Counting frames raises in Pillow; the pixels of the first frame are still compared."""
    path = tmp_path / "cut.tif"
    path.write_bytes(seeds()["tiff-pages"][:-3000])
    with Image.open(path) as image, pytest.raises(KeyError):
        _ = image.n_frames
    pixels = decode(path.read_bytes())
    assert hostile.by_pillow(path, pixels)["pillow"] == "same"
    assert hostile.by_pillow(path, 255 - pixels)["pillow"] == "differs"


def test_a_difference_without_an_explanation_is_unexplained() -> None:
    row = {"reason": "", "pillow": "differs", "mode": "RGB", "frames": 1, "turned": False}
    row |= {"format": "JPEG", "differs": "Pillow's pixels"}
    assert hostile.explanation(row) == "unexplained"
    assert hostile.explanation(row | {"mode": "CMYK"}) == "CMYK by its own profile"
