"""`predict.py` on all kinds of inputs, and on damaged and hostile files."""

import csv
import gzip
import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageOps

import predict
from imaging import tar
from imaging.decode import MAX_BYTES, DecodeError, decode
from model import load_detector
from model.checkpoint import annotate
from model.inference import inputs
from model.inference.run import heatmap_path
from sharding.format import open_shards
from tests.builders import KINDS, awkward_files, encode, photo, write_tar, write_zip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ALL = {"a.jpg": encode(photo(1)), "b.png": encode(photo(2), "PNG"), "c/d.webp": encode(photo(3))}


@pytest.fixture
def ask(small_runs: Path) -> Callable[..., Result]:
    """Function that runs `predict.py` with the given arguments."""

    def run(*arguments: object, stdin: str | None = None) -> Result:
        command = [*map(str, arguments), "--runs", str(small_runs)]
        return CliRunner().invoke(predict.main, command, input=stdin)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folder with the images of `ALL`."""
    for name, data in ALL.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "photos"


def rows_of(result: Result) -> dict[str, dict]:
    """Return the rows of JSON lines by path."""
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


# --- inputs ---------------------------------------------------------------------------------------


def test_an_image_has_the_same_score_in_files_folders_and_archives(
    ask: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    places = {
        photos: photos,
        write_zip(tmp_path / "x.zip", ALL): tmp_path / "x.zip",
        write_tar(tmp_path / "x.tar", ALL): tmp_path / "x.tar",
        write_tar(tmp_path / "y.tgz", ALL, "w:gz"): tmp_path / "y.tgz",
        write_tar(tmp_path / "z.tar.xz", ALL, "w:xz"): tmp_path / "z.tar.xz",
        f"{tmp_path}/**/*.[jpw]*": photos,
        "-": photos,
    }  # fmt: skip
    listed = "".join(f"{photos / name}\r\n" for name in ALL)
    expected = None
    for named, folder in places.items():
        result = ask(named, "--format", "jsonl", stdin=listed)
        assert result.exit_code == 0, result.output
        rows = rows_of(result)
        assert rows.keys() == {str(folder / name) for name in ALL}
        scores = [rows[str(folder / name)]["probability"] for name in ALL]
        expected = expected or scores
        np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert len(set(expected)) == len(ALL)


def test_a_shard_set_gives_its_images(ask: Callable[..., Result], data: Path) -> None:
    result = ask(data / "val", "--format", "csv")
    assert result.exit_code == 0, result.output
    shards = open_shards([data / "val"])
    paths = [row["path"] for row in csv.DictReader(io.StringIO(result.stdout))]
    formats = shards.names("format", np.arange(len(shards)))
    endings = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    assert sorted(paths) == sorted(
        f"{shards.shard_path(row)}/{shards.text('key', row)}.{endings[formats[row]]}"
        for row in range(len(shards))
    )
    assert "left out" not in result.stderr


def test_skipped_files_of_a_folder_are_counted(ask: Callable[..., Result], photos: Path) -> None:
    (photos / ".hidden.jpg").write_bytes(ALL["a.jpg"])
    (photos / "notes.txt").write_text("no image")
    write_zip(photos / "x.zip", ALL)
    (photos / "c" / "circle").symlink_to(photos)
    (photos / "link.jpg").symlink_to(photos / "a.jpg")
    result = ask(photos)
    assert result.exit_code == 0, result.output
    assert "4 images" in result.stderr and "1 file skipped: hidden" in result.stderr
    for said in ("hidden", "its name (.txt)", "an archive (name", "a link to a folder"):
        assert said in result.stderr
    for number in range(20):
        (photos / f"a.x{number}").touch()
    lines = ask(photos).stderr.splitlines()
    assert sum(" skipped: " in line for line in lines) == 12
    assert any(line.endswith("12 files skipped for other reasons") for line in lines)


def test_a_large_folder_is_read_in_parts_without_loss(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "RUN", 2)
    for number in range(7):
        (photos / f"{number}.jpg").touch()
    names = [file.name for file in inputs.find_images([str(photos)], Counter())]
    assert len(names) == len(set(names)) == 10


def test_wrong_commands_give_one_line_and_exit_code_2(
    ask: Callable[..., Result], photos: Path, tmp_path: Path
) -> None:
    for arguments, said in (
        ([], "name images, folders or archives"),
        ([tmp_path / "none"], "does not exist"),
        ([f"{tmp_path}/*.none"], "does not exist"),
        (["https://example.com/a.jpg"], "does not exist; images are read from disk, so download"),
        ([photos, "--watch", photos], "not both"),
        ([photos, "--resume"], "name the file with --out"),
        ([photos, "--out", tmp_path / "report.pdf"], "there is no format for .pdf"),
        ([photos, "--heatmap", photos / "heat"], "is inside"),
        (["--watch", photos, "--heatmap", photos / "heat"], "name a folder outside"),
        ([f"{photos}/**", "--heatmap", photos / "heat"], "is inside"),
        ([f"{photos}/*", "--heatmap", photos / "c/heat"], "is inside"),
        ([photos, "--out", tmp_path / "x.txt", "--resume"], "--format csv or jsonl"),
        ([photos, "--threshold", "2"], "0<=x<=1"),
        ([photos, "--device", "none"], "no such device"),
        ([photos, "--checkpoint", tmp_path], "neither a checkpoint nor a run"),
        ([photos, "--checkpoint", photos / "a.jpg"], "neither a checkpoint nor a run"),
    ):  # fmt: skip
        result = ask(*arguments)
        assert result.exit_code == 2, arguments
        assert said in result.stderr
        assert not result.stdout
    (tmp_path / "empty").mkdir()
    assert ask(tmp_path / "empty").exit_code == 2
    for name in ("r.csv", "r.jsonl", "r.txt"):
        assert ask(tmp_path / "empty", "--out", tmp_path / name).exit_code == 2
    assert not list(tmp_path.glob("r.*"))
    (tmp_path / "r.txt.partial").touch()
    result = ask(photos, "--out", tmp_path / "r.txt")
    assert result.exit_code == 2 and "partial exists; remove it, or name another" in result.stderr
    assert ask(photos).exit_code == 0
    (photos / "broken.jpg").write_bytes(ALL["a.jpg"][:100])
    result = ask(photos)
    assert result.exit_code == 1
    assert "1 of 4 images have no verdict" in result.stderr
    assert ask("-", stdin="nowhere.jpg\n").exit_code == 1
    result = ask("-", stdin=f"{photos}/a.jpg\na\0b.jpg\n{photos}/a.jpg\n")
    assert result.exit_code == 1 and "its path has a zero byte" in result.stdout
    assert "1 of 3 images have no verdict" in result.stderr
    named_none = ask("-", stdin="\n")
    assert named_none.exit_code == 2
    assert "standard input named no image; expected file names" in named_none.stderr


# --- damaged and hostile files --------------------------------------------------------------------


def test_hostile_members_are_refused_by_name(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"../up.jpg": b"x", "/etc/root.jpg": b"x", "C:\\windows.jpg": b"x"}
    write_zip(tmp_path / "x.zip", ALL | hostile)
    monkeypatch.setattr(tar, "MAX_BYTES", 100_000)
    for mode in ("w", "w:gz"):
        path = tmp_path / f"x.{'tgz' if mode[2:] else 'tar'}"
        with tarfile.open(path, mode) as archive:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                member = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            for name, data in (ALL | hostile | {"huge.png": bytes(100_001)}).items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    expected = {
        "x.zip": 3,
        "x.tar": 8,
        "x.tgz": 9,
    }  # a gzip is read only up to the too large member
    for name, refused in expected.items():
        result = ask(tmp_path / name, "--format", "jsonl")
        assert result.exit_code == 1
        rows = rows_of(result)
        errors = {path: row["error"] for path, row in rows.items() if row["error"]}
        assert len(rows) - len(errors) == len(ALL)
        assert len(errors) == refused, errors
        assert sum("leaves the archive" in error for error in errors.values()) == len(hostile)
    assert not (tmp_path / "up.jpg").exists()
    assert not (tmp_path.parent / "up.jpg").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_tar_is_reported_and_earlier_members_are_kept(
    ask: Callable[..., Result], tmp_path: Path, mode: str
) -> None:
    path = write_tar(tmp_path / "x.tar", {f"{n}.png": encode(photo(n), "PNG") for n in range(4)})
    whole = path.read_bytes()
    third = whole.index(b"2.png\0")
    for damaged in (
        whole[: third + 700],  # cut off inside a member
        whole[:third],  # cut off between two members
        whole[:third] + os.urandom(512) + whole[third + 512 :],  # a damaged header
    ):
        data = damaged if mode == "w" else gzip.compress(damaged)
        path.write_bytes(data)
        result = ask(path, "--format", "jsonl")
        assert result.exit_code == 1
        rows = rows_of(result)
        assert [bool(rows[f"{path}/{n}.png"]["error"]) for n in range(2)] == [False, False]
        reasons = [row["error"] for row in rows.values() if row["error"]]
        assert any("damaged or cut off" in reason for reason in reasons), reasons
    cut = path.with_suffix(".tgz")
    cut.write_bytes(gzip.compress(whole)[:-2000])
    assert any("cut off" in row["error"] for row in rows_of(ask(cut, "--format", "jsonl")).values())


def test_endless_or_huge_inputs_are_refused(ask: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    (folder / "bomb.png").write_bytes(KINDS["bomb"])
    with (folder / "huge.png").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    (folder / "folder.jpg").mkdir()
    (folder / "good.jpg").write_bytes(ALL["a.jpg"])
    result = ask(folder, "--format", "jsonl")
    assert result.exit_code == 1
    rows = rows_of(result)
    said = {Path(path).name: row["error"] for path, row in rows.items()}
    assert said.pop("good.jpg") == ""
    assert said == {
        "pipe.jpg": "not a plain file, but a pipe, a device or the like",
        "zero.jpg": "not a plain file, but a pipe, a device or the like",
        "gone.jpg": "No such file or directory",
        "bomb.png": said["bomb.png"],
        "huge.png": "536,870,913 bytes, more than the limit of 536,870,912",
    }
    assert "more than the 200 allowed" in said["bomb.png"]


def test_every_broken_file_gives_an_image_or_one_error_line(
    ask: Callable[..., Result], tmp_path: Path
) -> None:
    for name, data in KINDS.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    result = ask(tmp_path, "--format", "jsonl")
    assert result.exit_code == 1
    rows = rows_of(result)
    assert len(rows) == len(KINDS)
    for name in KINDS:
        row = rows[str(tmp_path / f"{name}.jpg")]
        assert (row["probability"] is None) == bool(row["error"])
        assert "\n" not in row["error"]
    unreadable = {Path(path).stem for path, row in rows.items() if row["error"]}
    assert {"empty", "html", "zeros", "half a jpeg", "half a png", "bomb"} <= unreadable
    assert not {"gif", "bmp", "tiff", "avif", "cmyk", "16 bit", "animated"} & unreadable


@pytest.mark.slow
@pytest.mark.skipif(not awkward_files(), reason="AWKWARD_IMAGES names no folder of hostile files")
def test_every_hostile_file_in_a_folder(ask: Callable[..., Result]) -> None:
    """Each file gives the same upright pixels as Pillow, or one line with the reason."""
    files = awkward_files()
    result = ask("-", "--format", "jsonl", stdin="".join(f"{path}\n" for path in files))
    rows = rows_of(result)
    assert len(rows) == len(files)
    assert result.exit_code == int(any(row["error"] for row in rows.values()))
    for path in files:
        try:
            pixels = decode(path.read_bytes())
        except DecodeError as error:
            assert rows[str(path)]["error"] == " ".join(str(error).split())
            continue
        assert not rows[str(path)]["error"]
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            image.load()
            if image.mode[0] not in "IF":  # Pillow clips these modes, this program scales
                upright = ImageOps.exif_transpose(image).convert("RGB")
                np.testing.assert_array_equal(pixels, np.asarray(upright), str(path))


# --- results --------------------------------------------------------------------------------------


def test_verdicts_follow_the_band_of_the_checkpoint(
    ask: Callable[..., Result], photos: Path, small_runs: Path
) -> None:
    folder = small_runs / "small" / "step_0000001"
    first = sorted(row["probability"] for row in rows_of(ask(photos, "--format", "jsonl")).values())
    band = [(first[0] + first[1]) / 2, first[2]]  # the upper end of the band is likely AI
    annotate(folder, {"calibration": {"band": band}})
    try:
        rows = rows_of(ask(photos, "--format", "jsonl"))
        verdicts = [row["verdict"] for row in sorted(rows.values(), key=lambda r: r["probability"])]
        assert verdicts == ["no sign of AI", "uncertain", "likely AI"]
        rows = rows_of(ask(photos, "--format", "jsonl", "--threshold", first[1]))
        verdicts = [row["verdict"] for row in sorted(rows.values(), key=lambda r: r["probability"])]
        assert verdicts == ["no sign of AI", "likely AI", "likely AI"]
    finally:
        annotate(folder, {"calibration": None})


def test_verdicts_follow_the_error_rates_asked_for(
    ask: Callable[..., Result], photos: Path, small_runs: Path
) -> None:
    folder = small_runs / "small" / "step_0000001"
    lowest, middle, highest = sorted(
        row["probability"] for row in rows_of(ask(photos, "--format", "jsonl")).values()
    )
    above = highest + 1e-6
    annotate(
        folder,
        {"calibration": {
            "band": [lowest, middle], "at_fpr": [[0.01, above], [0.05, highest], [0.2, middle]],
            "at_miss": [[0.05, lowest], [0.1, middle]],
        }},
    )  # fmt: skip

    def verdicts(*options: str | float) -> list[str]:
        rows = rows_of(ask(photos, "--format", "jsonl", *options))
        return [row["verdict"] for row in sorted(rows.values(), key=lambda row: row["probability"])]

    try:
        assert verdicts() == ["uncertain", "likely AI", "likely AI"]
        assert verdicts("--max-fpr", 0.05) == ["uncertain", "uncertain", "likely AI"]
        assert verdicts("--max-fpr", 0.019) == ["uncertain"] * 3
        assert verdicts("--max-fpr", 0.05, "--max-miss", 0.1) == [
            "no sign of AI", "uncertain", "likely AI",
        ]  # fmt: skip
        refused = ask(photos, "--max-fpr", 0.001)
        assert refused.exit_code == 2
        assert "no threshold for an error rate of 0.001" in refused.stderr
        both = ask(photos, "--max-fpr", 0.05, "--threshold", 0.5)
        assert both.exit_code == 2
        assert "--threshold cannot be combined with --max-fpr" in both.stderr
    finally:
        annotate(folder, {"calibration": None})


def test_a_file_cannot_write_to_the_terminal(ask: Callable[..., Result], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "Camera\x1b[31m\nred"
    path = tmp_path / "a\x1b[2Jb\nc.jpg"
    path.write_bytes(encode(photo(1), "JPEG", exif=exif))
    result = ask(tmp_path)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert len(result.stdout.splitlines()) == 3
    assert "the file says: camera: Camera red (EXIF)" in result.stdout


def test_a_heatmap_for_each_image(ask: Callable[..., Result], photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no")
    write_zip(tmp_path / "x.zip", ALL)
    result = ask(photos, tmp_path / "x.zip", "--heatmap", tmp_path / "maps")
    assert result.exit_code == 1
    below = tmp_path / "maps" / photos.relative_to("/").parent
    written = (path.relative_to(below).as_posix() for path in below.rglob("*.png"))
    # The paths are absolute, so each name has a hash.
    assert sorted(re.sub(r"-[0-9a-f]{8}\.png$", ".png", path) for path in written) == sorted(
        f"{place}/{name}.png" for place in ("photos", "x.zip") for name in ALL
    )
    with Image.open(heatmap_path(str(photos / "a.jpg"), tmp_path / "maps")) as image:
        assert image.size == (32, 32)


def test_heatmaps_may_lie_beside_what_a_pattern_matches(
    ask: Callable[..., Result], photos: Path
) -> None:
    maps = photos / "maps"
    assert ask(f"{photos}/*.jpg", "--heatmap", maps).exit_code == 0
    assert list(maps.rglob("*.png")) == [heatmap_path(str(photos / "a.jpg"), maps)]


def test_heatmaps_with_long_and_impossible_names(
    ask: Callable[..., Result], tmp_path: Path
) -> None:
    """Names up to the limit of the file system get a heatmap; failures are reported."""
    folder, maps = tmp_path / "photos", tmp_path / "maps"
    folder.mkdir()
    names = ["x" * 250 + ".jpg", "x" * 249 + "y.jpg", "é" * 125 + ".jpg", os.fsdecode(b"\xe9.jpg")]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encode(photo(number)))
    assert ask(folder, "--heatmap", maps).exit_code == 0
    below = maps / folder.relative_to("/")
    assert len(list(below.iterdir())) == len(names)
    assert all(path.suffix == ".png" for path in below.iterdir())
    heatmap_path(str(folder / "blocked.jpg"), maps).mkdir()
    (folder / "blocked.jpg").write_bytes(encode(photo(9)))
    result = ask(folder, "--heatmap", maps, "--format", "jsonl")
    assert result.exit_code == 1
    assert len(rows_of_bytes(result)) == len(names) + 1
    assert "heatmaps that could not be written: 1" in result.stderr
    assert "no heatmap of" in result.stderr and "blocked.jpg" in result.stderr


def rows_of_bytes(result: Result) -> list[dict]:
    """Return the rows of JSON lines; names may be other than UTF-8."""
    return [json.loads(line) for line in result.stdout_bytes.splitlines()]


# --- watching a folder ----------------------------------------------------------------------------


def test_ctrl_c_ends_watching_cleanly(
    ask: Callable[..., Result], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in photos.rglob("*.*"):
        os.utime(path, (1, 1))
    looks = []

    def sleep(_seconds: float) -> None:
        looks.append(1)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(inputs.time, "sleep", sleep)
    out = tmp_path / "out.csv"
    result = ask("--watch", photos, "--out", out)
    assert result.exit_code == 0, result.output
    assert len(out.read_text().splitlines()) == 1 + len(ALL)
    assert "Ctrl-C to stop" in result.stderr


# --- equal scores ---------------------------------------------------------------------------------


def test_evidence_never_changes_the_score(
    ask: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal pixels with and without provenance metadata give the same bits."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0131] = "Canon", "EOS 40D", "Stable Diffusion"
    pixels = photo(5)
    (tmp_path / "silent.jpg").write_bytes(encode(pixels))
    (tmp_path / "speaks.jpg").write_bytes(encode(pixels, exif=exif))
    rows = rows_of(ask(tmp_path, "--format", "jsonl", "--batch-size", 1))
    silent, speaks = (rows[str(tmp_path / f"{name}.jpg")] for name in ("silent", "speaks"))
    assert silent["provenance"] == []
    assert {one["suggests"] for one in speaks["provenance"]} == {"AI", "camera"}
    assert silent["probability"] == speaks["probability"]
    assert silent["verdict"] == speaks["verdict"]
    monkeypatch.setattr("model.inference.run.read_evidence", lambda *_: [])
    again = rows_of(ask(tmp_path, "--format", "jsonl", "--batch-size", 1))
    assert again[str(tmp_path / "speaks.jpg")]["probability"] == speaks["probability"]


def test_python_and_predict_give_the_same_bits(
    ask: Callable[..., Result], photos: Path, small_runs: Path
) -> None:
    rows = rows_of(ask(photos, "--format", "jsonl"))
    names = sorted(rows)
    predictions = load_detector(runs=small_runs).predict(names)
    assert [one.probability for one in predictions] == [rows[name]["probability"] for name in names]
