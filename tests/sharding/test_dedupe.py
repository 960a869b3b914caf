"""Tests of duplicates: no evaluated image or near-duplicate of one is trained on."""

import csv
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imaging.decode import decode
from imaging.fingerprint import fingerprints, green_grid
from sharding.build import Tolerance, build
from sharding.catalog import read_catalog
from sharding.dedupe import MAX_BITS, Decision, decide, near_duplicates
from sharding.format import open_shards, read_index
from tests.builders import encode, photo

CATALOG = """
[sets]
phase1 = "train"
val = "val"
evalgen = "test"

[sources.coco]
license = "x"
set = "evalgen"
real = ["real"]

[sources.pairs]
license = "x"
set = "phase1"
group = '([^/]+)\\.\\w+$'
real = ["real"]
fake = ["fake"]

[sources.faces]
license = "x"
set = { phase1 = 0.5, val = 0.5 }
real = ["real"]
fake = ["fake"]

[sources.more]
license = "x"
set = "phase1"
real = ["real"]
fake = ["fake"]
"""


def picture(seed: int) -> np.ndarray:
    """Return large shapes with a little noise, whose spectrum falls like that of a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((160, 128), Image.Resampling.BICUBIC))
    fine = (photo(seed, 160, 128).astype(int) - 128) // 8
    return (smooth + fine).clip(0, 255).astype(np.uint8)


def jpeg(seed: int, quality: int = 90, size: tuple[int, int] | None = None) -> bytes:
    image = Image.fromarray(picture(seed))
    return encode(image.resize(size) if size else image, "JPEG", quality=quality)


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def pack(tmp_path: Path, only: list[str] | None = None):
    (tmp_path / "catalog.toml").write_text(CATALOG)
    catalog = read_catalog([tmp_path / "catalog.toml"])
    _, built = build(
        catalog,
        tmp_path / "raw",
        tmp_path / "out",
        jobs=1,
        only=only or [],
        tolerance=Tolerance(allow_incomplete=True),
    )
    rows = {}
    for one in built:
        for row in open_shards([tmp_path / "out" / one.name]).table.to_pylist():
            rows[row["origin"]] = (one.name, row["group"])
    return rows


def excluded(tmp_path: Path, name: str) -> dict[str, tuple[str, str]]:
    with (tmp_path / "out" / name / "excluded.csv").open() as stream:
        return {r["origin"]: (r["reason"], r["conflicts_with"]) for r in csv.DictReader(stream)}


def test_pairs_with_a_duplicate_of_an_evaluated_image_are_not_trained_on(tmp_path: Path) -> None:
    put(tmp_path / "raw", {
        "coco/real/a.jpg": jpeg(1),
        "coco/real/b.jpg": jpeg(2),
        "pairs/real/1.png": encode(picture(1), "PNG"),  # the same picture as coco's a
        "pairs/fake/1.png": encode(picture(50), "PNG"),  # its partner, another picture
        "pairs/real/2.png": encode(picture(3), "PNG"),
        "pairs/fake/2.png": encode(picture(51), "PNG"),
        "more/real/x.jpg": jpeg(2),  # the same bytes as b
        "more/real/y.jpg": jpeg(2, 60, (200, 200)),  # b, squashed and compressed
    })  # fmt: skip
    rows = pack(tmp_path)
    assert {o for o, (name, _) in rows.items() if name == "evalgen"} == {
        "coco/real/a.jpg", "coco/real/b.jpg",
    }  # fmt: skip
    assert {o for o, (name, _) in rows.items() if name == "phase1"} == {
        "pairs/real/2.png", "pairs/fake/2.png",
    }  # fmt: skip
    near, group = "near-duplicate of an image of evalgen", "belongs to the group of an image of"
    assert excluded(tmp_path, "phase1") == {
        "pairs/real/1.png": (near, "coco/real/a.jpg"),
        "pairs/fake/1.png": (f"{group} evalgen", "coco/real/a.jpg"),
        "more/real/x.jpg": (near, "coco/real/b.jpg"),
        "more/real/y.jpg": (near, "coco/real/b.jpg"),
    }
    assert read_index(tmp_path / "out/phase1")["excluded"] == {near: 3, f"{group} evalgen": 1}


def test_copies_inside_training_are_kept_once(tmp_path: Path) -> None:
    put(tmp_path / "raw", {
        "pairs/real/1.jpg": jpeg(1), "more/real/copy.jpg": jpeg(1), "more/fake/z.jpg": jpeg(2),
        "more/real/again.jpg": jpeg(1), "more/fake/recompressed.jpg": jpeg(2, 70),
    })  # fmt: skip
    rows = pack(tmp_path)
    assert set(rows) == {"pairs/real/1.jpg", "more/fake/z.jpg", "more/fake/recompressed.jpg"}
    assert rows["more/fake/z.jpg"][1] == rows["more/fake/recompressed.jpg"][1]  # one group


def test_an_image_with_both_labels_is_excluded_from_all_sets(tmp_path: Path) -> None:
    put(tmp_path / "raw", {
        "coco/real/a.jpg": jpeg(1), "more/fake/a.jpg": jpeg(1), "more/real/b.jpg": jpeg(2),
        "coco/real/c.jpg": jpeg(3),
    })  # fmt: skip
    assert set(pack(tmp_path)) == {"more/real/b.jpg", "coco/real/c.jpg"}
    reason = "the same bytes are labeled real and fake"
    assert excluded(tmp_path, "evalgen") == {"coco/real/a.jpg": (reason, "more/fake/a.jpg")}


def test_files_of_the_same_pixels_are_not_said_to_have_the_same_bytes(tmp_path: Path) -> None:
    """They are packed as the same PNG."""
    one, two, three = (encode(picture(n), "BMP") for n in (1, 2, 3))
    put(tmp_path / "raw", {
        "pairs/real/1.bmp": one, "more/real/1.tif": encode(picture(1), "TIFF"),
        "pairs/real/2.bmp": two, "more/fake/2.tif": encode(picture(2), "TIFF"),
        "pairs/fake/3.bmp": three, "more/fake/3.bmp": three,
    })  # fmt: skip
    pack(tmp_path)
    both = "the same pixels are labeled real and fake"
    reasons = {origin: reason for origin, (reason, _) in excluded(tmp_path, "phase1").items()}
    assert len(reasons) == 4 and list(reasons.values()).count(both) == 2
    assert reasons["pairs/real/2.bmp"] == reasons["more/fake/2.tif"] == both
    assert sorted(set(reasons.values()) - {both}) == [
        "the same bytes as an image of phase1", "the same pixels as an image of phase1"
    ]  # fmt: skip


def test_near_duplicates_go_to_the_same_set(tmp_path: Path) -> None:
    for n in range(30):
        put(tmp_path / "raw/faces", {
            f"real/{n}.jpg": jpeg(n), f"fake/{n}b.jpg": jpeg(n, 50, (120, 120)),
        })  # fmt: skip
    rows = pack(tmp_path)
    assert len(rows) == 60
    for n in range(30):
        assert rows[f"faces/real/{n}.jpg"] == rows[f"faces/fake/{n}b.jpg"]
    assert {name for name, _ in rows.values()} == {"phase1", "val"}


def test_new_images_move_no_old_image_to_another_set(tmp_path: Path) -> None:
    for n in range(30):
        put(tmp_path / "raw/faces", {f"real/{n}.jpg": jpeg(n)})
    before = pack(tmp_path)
    for n in range(30, 40):
        put(tmp_path / "raw/faces", {f"real/{n}.jpg": jpeg(n)})
    put(tmp_path / "raw", {"more/real/x.jpg": jpeg(100)})
    after = pack(tmp_path)
    assert {origin: after[origin] for origin in before} == before


def test_an_evaluation_set_is_the_same_built_alone_or_with_all_sets(tmp_path: Path) -> None:
    put(tmp_path / "raw", {
        "coco/real/a.jpg": jpeg(1), "more/fake/a.jpg": jpeg(4), "more/real/b.jpg": jpeg(1, 60),
    })  # fmt: skip
    pack(tmp_path, only=["evalgen"])
    index = (tmp_path / "out/evalgen/index.json").read_bytes()
    pack(tmp_path)
    assert (tmp_path / "out/evalgen/index.json").read_bytes() == index


DIVIDED = """
[sets]
phase = "train"
held = "val"
trial = "test"
[sources.aa]
license = "x"
set = "phase"
real = [{ folder = "real" }]
[sources.zz]
license = "x"
set = { held = 0.5, trial = 0.5 }
real = [{ folder = "real" }]
"""


def test_a_set_of_a_divided_source_is_the_same_built_alone(tmp_path: Path) -> None:
    """Copies in a training source decide to which of its sets an image of `zz` goes."""
    put(tmp_path / "raw", {f"zz/real/{n}.jpg": jpeg(n) for n in range(12)})
    put(tmp_path / "raw", {f"aa/real/{n}.jpg": jpeg(n, 60) for n in range(12)})
    (tmp_path / "catalog.toml").write_text(DIVIDED)
    indexes = []
    for only in ([], ["trial"], ["held"]):
        build(read_catalog([tmp_path / "catalog.toml"]), tmp_path / "raw", tmp_path / "out",
              only=only, jobs=1, tolerance=Tolerance(allow_incomplete=True))  # fmt: skip
        indexes.append([(tmp_path / f"out/{name}/index.json").read_bytes()
                        for name in ("held", "trial")])  # fmt: skip
    assert indexes[0] == indexes[1] == indexes[2]


BOTH = "the same bytes are labeled real and fake"


def decided(*rows: tuple[str, bytes, int, int, str]) -> Decision:
    """Decide on images given as (set, first byte of the bytes, pHash, label, group)."""
    columns = {
        "error": pa.array([""] * len(rows)),
        "sha256": pa.array([row[1].ljust(32) for row in rows], pa.binary(32)),
        "original": pa.array([bytes(32)] * len(rows), pa.binary(32)),
        "phash": pa.array([row[2] for row in rows], pa.uint64()),
        "thumbnail": pa.array([bytes(256)] * len(rows), pa.binary(256)),
        "group": pa.array([row[4] for row in rows]),
        "label": pa.array([row[3] for row in rows], pa.int8()),
        "destination": pa.array([f'{{"{row[0]}": 1}}' for row in rows]),
    }
    sets = {"first": "train", "second": "val", "third": "val", "last": "test"}
    return decide(pa.table(columns), sets)


@pytest.mark.parametrize(
    ("rows", "kept", "of"),
    [
        # Of the copies in the two validation sets only that of the first set is kept.
        ([("third", b"a", 0, 0, "x"), ("second", b"a", 0, 0, "y"), ("first", b"b", 0, 0, "z")],
         [1], "near-duplicate of an image of second"),
        ([("third", b"a", 0, 0, "x"), ("second", b"a", 0, 0, "y"), ("first", b"b", 2**40 - 1, 0,
         "x")], [1], "belongs to the group of an image of second"),
        # A near-duplicate that loses as well is not the image that is kept.
        ([("first", b"a", 0, 0, "x"), ("second", b"b", 0, 0, "y"),
          ("last", b"c", 2**40 - 1, 0, "y")], [2], "belongs to the group of an image of last"),
        # Bytes that are labeled real and fake are not kept, so they exclude no other image.
        ([("second", b"a", 0, 0, "x"), ("second", b"a", 0, 1, "y"), ("first", b"b", 0, 0, "z")],
         [2], None),
        ([("last", b"a", 0, 0, "x"), ("last", b"a", 0, 1, "y"), ("second", b"b", 0, 0, "z"),
          ("first", b"c", 0, 0, "w")], [2], "belongs to the group of an image of second"),
    ],
)  # fmt: skip
def test_the_image_named_instead_is_kept(
    rows: list[tuple[str, bytes, int, int, str]], kept: list[int], of: str | None
) -> None:
    decision = decided(*rows)
    assert np.flatnonzero(decision.sets != "").tolist() == kept
    assert (decision.reasons != "").tolist() == (decision.sets == "").tolist()
    for reason, other in zip(decision.reasons, decision.other.tolist(), strict=True):
        assert reason in ("", BOTH) or (other in kept and decision.sets[other] in reason)
    assert {r for r in decision.reasons if r.startswith(("near", "belongs"))} == ({of} - {None})


def test_bytes_of_both_labels_conflict_with_a_row_of_the_other_label() -> None:
    decision = decided(*(("first", b"a", 0, label, "x") for label in (0, 0, 1)))
    assert decision.reasons.tolist() == [BOTH] * 3 and decision.other.tolist() == [2, 2, 0]


@pytest.mark.parametrize("n", [0, 1, 2, 3000])
def test_the_search_finds_every_pair_of_an_exhaustive_comparison(n: int) -> None:
    rng = np.random.default_rng(n)
    hashes = rng.integers(0, 2**63, n, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (n, 256), dtype=np.uint8)
    for row in range(1, n, 3):  # copies with 0 to 9 bits changed, half of them with other pixels
        other = int(rng.integers(0, row))
        flips = rng.permutation(64)[: rng.integers(0, 10)]
        hashes[row] = int(hashes[other]) ^ sum(1 << int(bit) for bit in flips)
        if row % 2:
            thumbnails[row] = thumbnails[other]
    pairs = {tuple(pair) for pair in near_duplicates(hashes, thumbnails).tolist()}
    expected = set()
    for a in range(n):
        bits = np.bitwise_count(hashes[a] ^ hashes[a + 1 :])
        for b in a + 1 + np.flatnonzero(bits <= MAX_BITS):
            apart = np.abs(thumbnails[a].astype(int) - thumbnails[b]).mean()
            if hashes[a] != hashes[b] and apart <= 8:
                expected.add((a, int(b)))
    assert expected <= pairs
    assert len(expected) > 100 or n < 3000
    for a, b in pairs - expected:
        assert hashes[a] == hashes[b]


def test_the_search_of_similar_frames_needs_little_memory() -> None:
    """Frames of a video agree in many choices of bands; each pair is kept once."""
    rng = np.random.default_rng(5)
    frames = np.repeat(rng.integers(0, 2**63, 25, dtype=np.uint64), 40)
    flips = [np.uint64(sum(1 << int(b) for b in rng.permutation(64)[:3])) for _ in range(1000)]
    hashes = frames ^ np.array(flips, np.uint64)
    thumbnails = np.zeros((1000, 256), np.uint8)
    tracemalloc.start()
    pairs = near_duplicates(hashes, thumbnails)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    expected = sum(
        int((np.bitwise_count(hashes[a] ^ hashes[a + 1 :]) <= MAX_BITS).sum()) for a in range(1000)
    )
    assert len({tuple(sorted(pair)) for pair in pairs.tolist()}) == expected
    assert peak < 200 * len(pairs)


def test_copies_are_near_duplicates_and_different_images_are_not() -> None:
    files = [jpeg(n) for n in range(60)]
    files += [jpeg(n, 50) for n in range(60)]
    files += [jpeg(n, 85, (256, 256)) for n in range(60)]
    hashes, thumbnails = fingerprints(np.stack([green_grid(decode(data)) for data in files]))
    pairs = near_duplicates(hashes, thumbnails.reshape(-1, 256))
    assert all(a % 60 == b % 60 for a, b in pairs)
    assert (
        len({tuple(p) for p in pairs.tolist() if p[0] < 60}) >= 108
    )  # 90 % of the copies: distorted, or at quality 50


def test_an_image_read_from_memory_is_described_like_one_from_disk(tmp_path: Path) -> None:
    put(tmp_path / "raw", {"more/real/a.jpg": jpeg(1)})
    pack(tmp_path)
    (row,) = open_shards([tmp_path / "out/phase1"]).table.to_pylist()
    with Image.open(io.BytesIO(jpeg(1))) as image:
        assert (row["width"], row["height"]) == image.size
    assert row["exif"] is False
    assert len(row["jpeg_tables"]) == 8


def test_a_later_copy_does_not_rename_a_group() -> None:
    """The name decides to which set a group goes. If it were the last one, a copy in a later source
    would move packed images from the training set to the test set, or back.
    """
    one, two = ("first", b"a", 0, 0, "m"), ("first", b"b", 0, 0, "z")
    assert decided(one).groups.tolist() == ["m"]
    assert decided(one, two).groups.tolist() == decided(two, one).groups.tolist() == ["m", "m"]
