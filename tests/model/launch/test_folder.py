"""`train.py --folder`: from a folder of images to a checkpoint."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import train as command
from model import checkpoint
from model.launch import folder as launching
from model.launch.folder import default_weights
from model.shipped.backbone import CLIP_8_BIT
from sharding.format import read_index
from tests.builders import encode, photo

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("no_workers"),
]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with 30 real and 30 fake images, packed by one process."""
    for label, name in enumerate(("real", "fake")):
        folder = tmp_path / "mine" / name
        folder.mkdir(parents=True)
        for number in range(30):
            pixels = photo(1000 * label + number, 40, 40)
            (folder / f"{number}.jpg").write_bytes(encode(pixels))
    pack = launching.pack_folder
    monkeypatch.setattr(launching, "pack_folder", lambda *a, **o: pack(*a, **o, jobs=1))
    return tmp_path / "mine"


def run(folder: Path, *arguments: object) -> Result:
    where = ["--data", folder.parent / "shards", "--runs", folder.parent / "runs"]
    words = ["--folder", folder, *where, *arguments]
    return CliRunner().invoke(command.main, [str(word) for word in words])


def test_a_folder_becomes_a_detector(mine: Path, tiny_recipe: Path) -> None:
    (mine / "fake/midjourney.tar").touch()
    result = run(mine, "--recipe", tiny_recipe, "--set", "run.epochs=1")
    assert result.exit_code == 0, result.output
    (place,) = (mine.parent / "shards/folders").iterdir()
    packed = next(line for line in result.stderr.splitlines() if " packed in " in line)
    assert packed.startswith(f"{mine} packed in {place}: ") and "held out (mine-val)" in packed
    assert "excluded: mine: 1 file: not an image by its name (.tar) (first: fake/" in result.stderr
    assert "instead of 16, because there are few images" in result.stderr
    meta = checkpoint.read_meta(checkpoint.best_of(mine.parent / "runs/mine"))
    assert meta["recipe"]["data"]["train"] == [f"folders/{place.name}/mine"]
    assert list(meta["metrics"]["sets"]) == ["mine-val"]
    samples = read_index(place / "mine")["samples"]
    assert meta["recipe"]["loading"]["batch_size"] == samples // 8
    again = run(mine, "--recipe", tiny_recipe, "--set", "run.epochs=1")
    assert again.exit_code == 0, again.output
    assert f"{mine} is up to date, packed in {place}: " in again.stderr
    assert "is finished; nothing to do" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_packing_and_the_same_command_goes_on(
    mine: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    raised = []

    @contextlib.contextmanager
    def stopping(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
        def advance(count: int) -> None:
            raised.append(count)
            signal.raise_signal(number)

        yield advance

    ignored = signal.signal(number, lambda *_: None)  # without a handler it would end pytest
    with monkeypatch.context() as patch:
        patch.setattr(launching, "image_progress", stopping)
        stopped = run(mine, "--recipe", tiny_recipe, "--dry-run")
    signal.signal(number, ignored)
    assert (stopped.exit_code, len(raised)) == (130, 1), stopped.output
    assert f"stopped by {number.name}; run the same command again to resume" in stopped.stderr
    again = run(mine, "--recipe", tiny_recipe, "--dry-run")
    assert again.exit_code == 0 and " packed in " in again.stderr, again.output


def test_more_images_are_the_reason_that_a_run_does_not_resume(
    mine: Path, tiny_recipe: Path
) -> None:
    """Not the batch size, which follows from their number."""
    assert run(mine, "--recipe", tiny_recipe).exit_code == 0
    for label, name in enumerate(("real", "fake")):
        for number in range(30, 60):
            pixels = photo(1000 * label + number, 40, 40)
            (mine / name / f"{number}.jpg").write_bytes(encode(pixels))
    result = run(mine, "--recipe", tiny_recipe)
    assert result.exit_code == 1
    assert "the shard set has been built again since this run began" in result.stderr


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ('data.train=["other"]', "data.train"),
        ('data.validate=["other"]', "data.validate"),
        (
            'data={train=["other"], validate=["other"], policy="train"}',
            "data.train and data.validate",
        ),
    ],
)
def test_sets_that_the_packed_ones_would_replace_are_refused(
    mine: Path, tiny_recipe: Path, setting: str, key: str
) -> None:
    result = run(mine, "--recipe", tiny_recipe, "--set", setting)
    assert result.exit_code == 1
    assert f"--folder trains and validates on the sets that it packs, so {key} " in result.stderr
    assert not (mine.parent / "shards").exists()


def test_a_recipe_that_replays_keeps_its_own_validation_sets(
    mine: Path, tiny_recipe: Path, data: Path
) -> None:
    (mine.parent / "shards").mkdir()
    for name in ("old", "val"):
        (mine.parent / "shards" / name).symlink_to(data / name)
    result = run(
        mine, "--recipe", tiny_recipe, "--set", "name=more", "--dry-run",
        "--set", 'replay.sets=["old"]', "--set", "replay.ratio=1:4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "validation mine-val" in result.stdout and "validation val" in result.stdout
    assert "more: convnextv2_atto" in result.stdout
    assert not (mine.parent / "runs").exists()


def test_without_its_backbone_the_default_recipe_says_what_to_type(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_CACHE", str(mine.parent / "cache"))
    result = run(mine)
    assert result.exit_code == 1
    assert "type `python -m model fetch`, or name another recipe" in result.stderr
    assert not (mine.parent / "shards").exists()
    path = mine.parent / "cache" / f"{CLIP_8_BIT.files[0].sha256}.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    assert default_weights() == path


def test_mistakes_are_one_line(mine: Path, tiny_recipe: Path) -> None:
    (mine / "fake").rename(mine / "generated")
    result = run(mine, "--recipe", tiny_recipe)
    assert result.exit_code == 1
    assert "has no folder of fake images" in result.stderr and "Traceback" not in result.stderr
    result = run(mine, "--recipe", tiny_recipe, "--phase", "1")
    assert result.exit_code == 2 and "give --phase 1, --phase 2 or --recipe" in result.stderr
    assert run(mine.parent / "none").exit_code == 2
