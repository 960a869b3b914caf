"""The commands `preview` (a picture of augmented samples) and `order` (how well shuffles mix)."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline.__main__ import main
from pipeline.augment import LEAST_SIGMA, AugmentParams
from pipeline.preview import CELL, PreviewRow, picture_of, words_of
from tests.builders import photo


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_preview_shows_the_same_samples_through_both_backends(data: Path, tmp_path: Path) -> None:
    status, output = run("preview", data / "old", "--out", tmp_path / "grid.png", "--count", 2)
    assert status == 0, output
    assert "2 samples of" in output
    mean = float(output.split("mean ")[1].split(",")[0])
    assert mean < 2
    sheet = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert sheet.shape[0] > 2 * CELL
    again = tmp_path / "again.png"
    run("preview", data / "old", "--out", again, "--count", 2)
    assert again.read_bytes() == (tmp_path / "grid.png").read_bytes()
    run("preview", data / "old", "--out", again, "--count", 2, "--seed", 1)
    assert again.read_bytes() != (tmp_path / "grid.png").read_bytes()


def test_preview_without_dali_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.loader._is_installed", lambda _name: False)
    status, output = run("preview", data / "old", "--out", tmp_path / "grid.png", "--count", 2)
    assert status == 0
    assert "nvidia-dali-cuda120 is not installed" in output
    assert "dali - pil" not in output


def test_preview_names_the_settings_that_training_takes_from_the_weights(
    data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        'name = "own"\n[data]\npolicy = "train"\n[augment.train]\n[augment.dda]\n'
        '[preprocess]\ncrop_size = 224\n[network]\nname = "vit_base_patch16_clip_224.openai"\n'
    )
    out = tmp_path / "grid.png"
    few = ("--out", out, "--count", 1)
    status, output = run("preview", data / "old", *few, "--recipe", recipe)
    assert status == 0, output
    assert "shown with resize_size=288, interpolation=bilinear" in " ".join(output.split())
    _, output = run("preview", data / "old", *few)
    assert "shown with" not in output


def test_preview_takes_a_crop_that_is_larger_than_the_default_resize(
    data: Path, tmp_path: Path
) -> None:
    """As training does, which takes the missing size from the network's weights."""
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        'name = "own"\n[data]\npolicy = "train"\n[augment.train]\n[augment.dda]\n'
        "[preprocess]\ncrop_size = 320\n"
    )
    out = tmp_path / "grid.png"
    status, output = run("preview", data / "old", "--out", out, "--recipe", recipe, "--count", 1)
    assert status == 0, output
    with recipe.open("a") as stream:
        stream.write("resize_size = 300\n")
    status, output = run("preview", data / "old", "--out", out, "--recipe", recipe)
    assert status == 1 and "16 <= crop_size <= resize_size, got 320 and 300" in output


def test_the_words_name_every_operation_that_a_backend_applies() -> None:
    params = AugmentParams(top=0, left=0, height=64, width=64, vflip=True, blur=LEAST_SIGMA)
    params = params._replace(detail_top=7, detail_left=9, detail_side=32)
    assert words_of(params)[1:] == ["detail 32 x 32 at 9, 7", "vertical flip", "blur 0.25"]
    assert len(words_of(params._replace(blur=LEAST_SIGMA - 0.01))) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preview", "nowhere"], "no shard set at nowhere"),
        (["preview", "{old}", "--recipe", "x.toml"], "no recipe at x.toml"),
        (
            ["preview", "{old}", "--policy", "none"],
            "by policy 'none', but the recipe describes train, dda",
        ),
        (["order", "nowhere"], "no shard set at nowhere"),
        (["order", "{old}", "--batch", "99"], "fewer than a batch of 99; use a smaller --batch"),
    ],
)
def test_wrong_arguments_are_errors_with_one_clear_line(
    data: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = run(*[argument.format(old=data / "old") for argument in arguments])
    assert status == 1
    assert said in output
    assert not list(tmp_path.glob("*.png"))


def test_order_measures_both_shuffles(data: Path) -> None:
    status, output = run("order", data / "old", "--batch", 8)
    assert status == 0
    assert "global" in output and "block" in output


def test_equal_pixels_give_a_gray_difference_and_others_do_not() -> None:
    pixels = photo(1, 64, 64)
    params = AugmentParams(top=0, left=0, height=64, width=64)
    same = PreviewRow(photo(1), params, pixels, pixels, ["a"])
    other = PreviewRow(photo(1), params, pixels, np.minimum(pixels, 250) + np.uint8(2), ["b"])
    sheet = np.asarray(picture_of([same, other]))
    last = slice(3 * (CELL + 8), 3 * (CELL + 8) + CELL)
    assert (sheet[28 : 28 + CELL, last] == 128).all()
    assert np.median(sheet[36 + CELL : 36 + 2 * CELL, last]) == 128 + 2 * 16
