"""Tests of `python -m sharding pairs`, which writes a raw folder of pairs and its catalog."""

import hashlib
import json
import shutil
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from PIL import Image

import storage
from pipeline.pairs import partners_of
from sharding.__main__ import main as sharding
from sharding.audit.audit import audit
from sharding.build import Tolerance, build
from sharding.catalog import LONGEST_NAME, CatalogError, read_catalog
from sharding.format import ShardError, ShardSet, open_shards
from sharding.pairs.decoder import Decoder
from sharding.pairs.run import make_pairs
from sharding.verify import verify
from tests.builders import build_all, encode, oriented, photo
from tests.sharding.pairs.vae import save_plain

CATALOG = """
[sets]
shots = "val"

[sources.camera]
license = "mine"
set = "shots"
real = ["real"]
fake = ["fake"]

[sources.phone]
license = "theirs"
set = "shots"
real = ["real"]
"""
REALS = 64


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set with every kind of real image: odd and even sizes, gray, turned, and three that
    get no partner. The set also has a fake, which must be ignored.
    """
    raw = tmp_path_factory.mktemp("raw")
    writers = [
        lambda image: encode(image, quality=90, subsampling="4:4:4"),
        lambda image: encode(image, quality=75, subsampling="4:2:0"),
        lambda image: encode(image.convert("L"), quality=80),
        lambda image: encode(image, "PNG"),
        lambda image: encode(image, "WEBP", quality=70),
        lambda image: oriented(image, "JPEG", "exif", 6),
        lambda image: encode(image, "BMP"),
        lambda image: oriented(image, "PNG", "exif", 3),
    ]
    for folder in ("camera/real", "camera/fake", "phone/real"):
        (raw / folder).mkdir(parents=True)
    for number in range(REALS):
        image = Image.fromarray(photo(number, 40 + 3 * (number % 11), 40 + 5 * (number % 9)))
        source = "phone" if number % 3 else "camera"
        path = raw / source / "real" / f"{number:03d}.jpg"
        path.write_bytes(writers[number % len(writers)](image))
    (raw / "camera/fake/0.png").write_bytes(encode(photo(1000), "PNG"))
    (raw / "phone/real/large.png").write_bytes(encode(photo(1001, 200, 100), "PNG"))
    palette = Image.fromarray(photo(1002)).quantize(32)
    (raw / "phone/real/palette.png").write_bytes(encode(palette, "PNG"))
    (raw / "catalog.toml").write_text(CATALOG)
    return build_all(raw, tmp_path_factory.mktemp("shards")) / "shots"


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Return a decoder that darkens every pixel, because a real VAE takes seconds to load."""
    return Decoder(
        "plain", "AutoencoderTiny", "1" * 64, 1, lambda pixels: (pixels * 0.98).astype(np.uint8)
    )


@pytest.fixture(scope="module")
def made(shots: Path, decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pairs")
    pairs = make_pairs(shots, out, decoder, max_megapixels=0.01)
    assert pairs.counts == {"camera": 22, "phone": 42} and pairs.already == 0
    assert pairs.excluded == {
        "more than 0.01 megapixels": 1,
        "palette image, whose few colors a decoder does not keep": 1,
    }
    return out


@pytest.fixture(scope="module")
def packed(made: Path) -> ShardSet:
    catalog = read_catalog([made / "shots-pairs.toml"])
    build(catalog, made, made / "shards", jobs=1, tolerance=Tolerance(0, False))
    return open_shards([made / "shards" / "shots-pairs"])


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "shards" not in path.parts and path.name != "lock"
    }


def test_the_build_packs_whole_pairs_with_equal_facts(packed: ShardSet, made: Path) -> None:
    assert verify([made / "shards" / "shots-pairs"], jobs=1) == []
    rows = packed.table.to_pylist()
    assert Counter(row["label"] for row in rows) == {0: REALS, 1: REALS}
    groups: dict[str, dict[int, dict]] = {}
    for row in rows:
        assert row["label"] not in groups.setdefault(row["group"], {})
        groups[row["group"]][row["label"]] = row
    alike = ("width", "height", "format", "chroma", "jpeg_quality", "jpeg_tables", "exif",
             "orientation", "source", "split")  # fmt: skip
    for pair in groups.values():
        assert [pair[0][name] for name in alike] == [pair[1][name] for name in alike]
        assert pair[0]["sha256"] != pair[1]["sha256"]
    assert {row["split"] for row in rows} == {"val"}
    assert {row["generator"] for row in rows if row["label"]} == {"plain"}
    sources = packed.sources
    assert {name: facts["license"] for name, facts in sources.items()} == {
        "shots-pairs-camera": "mine", "shots-pairs-phone": "theirs"
    }  # fmt: skip
    assert {facts["policy"] for facts in sources.values()} == {"dda"}
    # Training must not compress a fake again, because it is compressed like its partner.
    assert not any(partners_of(packed, (name,)).quality.any() for name in sources)


@pytest.mark.slow  # loads scikit-learn or diffusers
def test_metadata_does_not_separate_the_images_of_a_pair(packed: ShardSet) -> None:
    """The AUROC must be near 0.5; 128 images in 64 groups give a wide interval."""
    result = audit(packed)
    assert result.pooled is not None
    assert result.pooled.low < 0.5 < result.pooled.high + 0.1 and result.pooled.auroc < 0.6
    for name in ("format", "size", "aspect", "JPEG quality", "JPEG tables", "chroma", "EXIF"):
        assert result.features[name].alone.auroc <= 0.55, name


def test_a_second_run_gives_the_same_bytes(
    shots: Path, decoder: Decoder, made: Path, tmp_path: Path
) -> None:
    make_pairs(shots, tmp_path, decoder, max_megapixels=0.01)
    assert hashes(tmp_path) == hashes(made)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}

    def never(_pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("an existing pair was made again")

    again = make_pairs(shots, tmp_path, replace(decoder, reconstruct=never), max_megapixels=0.01)
    assert again.already == REALS == sum(again.counts.values())
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}


def test_an_interrupted_run_resumes(
    shots: Path, decoder: Decoder, made: Path, tmp_path: Path
) -> None:
    calls = []

    def stopping(pixels: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return decoder.reconstruct(pixels)

    with pytest.raises(KeyboardInterrupt):
        make_pairs(shots, tmp_path, replace(decoder, reconstruct=stopping), max_megapixels=0.01)
    assert not (tmp_path / "shots-pairs.toml").exists(), "the catalog, written last, must not exist"
    real, fake = (sorted(tmp_path.glob(f"shots-pairs/*/{kind}/*")) for kind in ("real", "fake"))
    fake[0].unlink()
    fake[1].write_bytes(fake[1].read_bytes()[:-200])
    real[2].write_bytes(b"damaged")
    fake[3].write_bytes(encode(photo(3), quality=33))  # undamaged, but no partner of its image
    pairs = make_pairs(shots, tmp_path, decoder, max_megapixels=0.01)
    assert pairs.already == 19 - 4
    assert hashes(tmp_path) == hashes(made)


def test_a_pair_is_written_whole_or_not_at_all(
    shots: Path, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = storage.publish

    def fails(partial: Path, path: Path) -> None:
        if path.parent.name == "fake":
            raise OSError("the disk is gone")
        publish(partial, path)

    monkeypatch.setattr(storage, "publish", fails)
    with pytest.raises(OSError, match="the disk is gone"):
        make_pairs(shots, tmp_path, decoder, max_megapixels=0.01)
    assert [path.parent.name for path in tmp_path.glob("shots-pairs/*/*/*")] == ["real"]


def test_another_decoder_or_limit_is_refused_if_pairs_exist(
    shots: Path, decoder: Decoder, made: Path, tmp_path: Path
) -> None:
    before = hashes(made)
    with pytest.raises(ShardError, match=r"was begun with decoder_sha256 .* choose another --out"):
        make_pairs(shots, made, replace(decoder, sha256="0" * 64), max_megapixels=0.01)
    with pytest.raises(ShardError, match=r"with max_megapixels 0.01, this is 0.5"):
        make_pairs(shots, made, decoder, max_megapixels=0.5)
    assert hashes(made) == before
    (tmp_path / "shots-pairs").mkdir()
    (tmp_path / "shots-pairs" / "mine.jpg").write_bytes(b"")
    with pytest.raises(ShardError, match="does not say what made them"):
        make_pairs(shots, tmp_path, decoder)


def test_the_error_of_a_set_without_pairs_gives_the_reason(
    shots: Path, decoder: Decoder, tmp_path: Path
) -> None:
    with pytest.raises(ShardError, match=r"66 more than 0.001 megapixels\); choose another set"):
        make_pairs(shots, tmp_path, decoder, max_megapixels=0.001)
    assert not (tmp_path / "shots-pairs.toml").exists()


def test_the_catalog_keeps_split_synthetic_and_test_only(decoder: Decoder, tmp_path: Path) -> None:
    """A test set must stay a test set, and synthetic images must stay marked."""
    (tmp_path / "raw/drawn/real").mkdir(parents=True)
    (tmp_path / "raw/drawn/real/0.png").write_bytes(encode(photo(0), "PNG"))
    (tmp_path / "raw/catalog.toml").write_text(
        '[sets]\nheld = "test"\n[sources.drawn]\nlicense = "mine"\nset = "held"\n'
        'real = ["real"]\nsynthetic = true\ntest_only = true\n'
    )
    folder = build_all(tmp_path / "raw", tmp_path / "shards") / "held"
    out = tmp_path / "out"
    pairs = make_pairs(folder, out, decoder)
    catalog = tomllib.loads(pairs.catalog.read_text())
    assert catalog["sets"] == {"held-pairs": "test"}
    source = catalog["sources"]["held-pairs-drawn"]
    assert source["synthetic"] is True and source["test_only"] is True
    started = out / ".pairs/held-pairs/started.json"
    for text in ("{", "7"):
        started.write_text(text)
        with pytest.raises(ShardError, match=r"started.json is damaged .* away"):
            make_pairs(folder, out, decoder)


def test_a_name_that_is_too_long_leaves_no_catalog(decoder: Decoder, tmp_path: Path) -> None:
    """`<set>-pairs-<source>` must be a name that a catalog accepts."""
    source = "s" * (LONGEST_NAME - 3)
    (tmp_path / f"raw/{source}/real").mkdir(parents=True)
    (tmp_path / f"raw/{source}/real/0.png").write_bytes(encode(photo(0), "PNG"))
    (tmp_path / "raw/catalog.toml").write_text(
        f'[sets]\nheld = "test"\n[sources.{source}]\nlicense = "mine"\nset = "held"\n'
        'real = ["real"]\n'
    )
    folder = build_all(tmp_path / "raw", tmp_path / "shards") / "held"
    with pytest.raises(CatalogError, match="characters; use at most"):
        make_pairs(folder, tmp_path / "out", decoder)
    assert not (tmp_path / "out" / "held-pairs.toml").exists()


def test_the_name_of_a_set_cannot_point_outside_the_folder(
    shots: Path, decoder: Decoder, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(shots, tmp_path / "shots"))
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | {"set": "../../escaped/x"}))
    with pytest.raises(ShardError, match=r"set '\.\./\.\./escaped/x' is no name for"):
        make_pairs(copy, tmp_path / "a/b/out", decoder, max_megapixels=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shots"]


@pytest.mark.parametrize("column", ["source", "key"])
def test_names_of_rows_cannot_point_outside_the_folder(
    shots: Path, decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    shards = open_shards([shots])
    index = shards.table.column_names.index(column)
    names = pa.array(["../../evil"] * len(shards))
    evil = replace(shards, table=shards.table.set_column(index, column, names))
    monkeypatch.setattr("sharding.pairs.run.open_shards", lambda _folders: evil)
    with pytest.raises(ShardError, match=rf"{column} '\.\./\.\./evil' is no name for a file"):
        make_pairs(shots, tmp_path / "out", decoder, max_megapixels=0.01)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".pairs"]


def test_damaged_shards_are_not_copied(shots: Path, decoder: Decoder, tmp_path: Path) -> None:
    copy = tmp_path / "shots"
    copy.mkdir()
    for path in shots.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shards = open_shards([copy])
    row = int(np.flatnonzero(shards.column("label") == 0)[0])
    with shards.shard_path(row).open("r+b") as tar:
        tar.seek(int(shards.column("offset")[row]) + 30)
        tar.write(b"\x55")
    with pytest.raises(ShardError, match="has other bytes than the index says"):
        make_pairs(copy, tmp_path / "out", decoder)


@pytest.mark.slow  # loads scikit-learn or diffusers
def test_the_command_writes_pairs_and_prints_how_to_pack_them(shots: Path, tmp_path: Path) -> None:
    decoder, out = save_plain(tmp_path / "plain"), tmp_path / "out"
    line = ["pairs", str(shots), "--decoder", str(decoder), "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(sharding, line)
    assert result.exit_code == 0, result.output
    assert "65 pairs" in result.output and "without a partner: 1 image: palette" in result.output
    assert f"--raw {out} --catalog {out / 'shots-pairs.toml'}" in result.output.replace("\n", " ")
    made = json.loads((out / "shots-pairs.json").read_text())
    assert made["pairs"] == {"camera": 22, "phone": 43} and made["decoder"] == "plain"
    assert "65 of them made before" in CliRunner().invoke(sharding, line).output
    line[3] = str(tmp_path / "nowhere")
    refused = CliRunner().invoke(sharding, line)
    assert refused.exit_code == 1 and "is no folder and no name of the hub" in refused.output
