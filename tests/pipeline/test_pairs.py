"""Aligned pairs: a fake is compressed as a JPEG with the quality and chroma of its real partner."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from imaging.jpeg import CHROMAS
from pipeline.augment import AugmentParams, AugmentPolicy
from pipeline.loader import open_loader
from pipeline.loading import Loading
from pipeline.pairs import partners_of
from pipeline.params import train_params
from pipeline.pil import apply
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream
from sharding.catalog import read_catalog
from sharding.format import ShardSet, open_shards
from tests.builders import PREPROCESS, build_all, encode, photo

# number -> (encoding of the real file, expected JPEG quality and chroma of its fake, a PNG)
REALS = {
    0: ({"quality": 60, "subsampling": 2}, (60, "420")),
    1: ({"quality": 85, "subsampling": 0}, (85, "444")),
    2: ({"quality": 96, "subsampling": 1}, (96, "422")),
    3: ("PNG", None),
    4: (None, None),  # no real image
    5: ({"quality": 75, "subsampling": 2}, None),  # the fake is a JPEG already
}

CATALOG = """
[sets]
mine = "train"
[sources.pairs]
license = "x"
set = "mine"
policy = "dda"
group = '([0-9]+)\\.[a-z]+$'
real = ["real"]
fake = ["fake"]
[sources.plain]
license = "x"
set = "mine"
real = ["real"]
fake = ["fake"]
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("pairs")
    for source in ("pairs", "plain"):
        for number, (how, _) in REALS.items():
            seed = 40 * (source == "plain") + 4 * number
            raw = folder / "raw" / source
            (raw / "real").mkdir(parents=True, exist_ok=True)
            (raw / "fake").mkdir(exist_ok=True)
            if how:
                is_png = how == "PNG"
                data = encode(photo(seed), "PNG") if is_png else encode(photo(seed), **how)
                (raw / f"real/{number:03d}.{'png' if is_png else 'jpg'}").write_bytes(data)
            fake = photo(seed + 1)
            kind = "JPEG" if number == 5 else "PNG"
            suffix = "jpg" if number == 5 else "png"
            (raw / f"fake/{number:03d}.{suffix}").write_bytes(encode(fake, kind))
    (folder / "c.toml").write_text(CATALOG)
    build_all(folder / "raw", folder / "out", catalog=read_catalog([folder / "c.toml"]))
    return open_shards([folder / "out/mine"])


def sample_of(shards: ShardSet, origin: str) -> int:
    return next(
        sample
        for sample in range(len(shards))
        if shards.text("origin", sample).rpartition(".")[0] == origin
    )


POLICIES = {"train": AugmentPolicy(), "dda": AugmentPolicy(match_pair_jpeg=True)}


def test_a_fake_is_compressed_as_its_partner_was(pairs: ShardSet, logged: list[str]) -> None:
    partners_of.cache_clear()
    params_for = train_params(pairs, POLICIES, "train", PREPROCESS, seed=1, epoch=0)
    everyone = np.arange(len(pairs))
    sampled = list(params_for(everyone, np.zeros(len(pairs), np.int64)).rows())
    expected = {
        sample_of(pairs, f"pairs/fake/{number:03d}"): wanted
        for number, (_, wanted) in REALS.items()
        if wanted
    }
    for sample, params in enumerate(sampled):
        wanted = expected.get(sample)
        assert (params.whole_jpeg, CHROMAS[params.whole_chroma]) == (wanted or (0, "420")), sample
    train_params(pairs, POLICIES, "train", PREPROCESS, seed=1, epoch=1)
    (said,) = [line for line in logged if "match_pair_jpeg" in line]
    assert "of the 6 fakes of pairs, 3 are compressed like their" in said
    assert "1 without exactly one real partner, 1 whose partner is no common JPEG, 1 that" in said


def test_matching_changes_no_other_parameter(pairs: ShardSet) -> None:
    """The two columns come from the index alone, so matching uses no random number."""
    everyone, repeat_index = np.arange(len(pairs)), np.zeros(len(pairs), np.int64)
    with_, without = (
        train_params(pairs, {"train": AugmentPolicy(), "dda": policy}, "train", PREPROCESS, 1, 0)(
            everyone, repeat_index
        )
        for policy in (
            AugmentPolicy(match_pair_jpeg=True, hflip=0.5, scale=(0.5, 1.0)),
            AugmentPolicy(hflip=0.5, scale=(0.5, 1.0)),
        )
    )
    assert not without.whole_jpeg.any()
    for field in set(AugmentParams._fields) - {"whole_jpeg", "whole_chroma"}:
        np.testing.assert_array_equal(getattr(with_, field), getattr(without, field))


def test_a_group_with_several_real_images_has_no_partner(pairs: ShardSet) -> None:
    """Such a group is a prompt or a video, not a pair."""
    table = pairs.table
    group = ["pairs/all"] * len(table)
    place = table.schema.get_field_index("group")
    merged = replace(pairs, table=table.set_column(place, "group", [group]), _columns={})
    assert not partners_of(merged, ("pairs",)).quality.any()


def test_the_whole_image_is_compressed_before_the_crop() -> None:
    """The JPEG blocks start at the corner of the file, as in a real image."""
    pixels = photo(3)
    compressed = np.asarray(Image.open(io.BytesIO(encode(pixels, quality=85, subsampling=0))))
    params = AugmentParams(top=5, left=3, height=40, width=50, hflip=True)
    pixels_out, expected = (torch.zeros((48, 48, 3), dtype=torch.uint8) for _ in range(2))
    apply(pixels, params._replace(whole_jpeg=85, whole_chroma=CHROMAS.index("444")), pixels_out)
    apply(compressed, params, expected)
    assert torch.equal(pixels_out, expected)


def test_both_backends_compress_the_same_fakes_alike(pairs: ShardSet) -> None:
    """Backends differ only by the rounding of a resize, and only fakes with a partner change."""
    seen = {}
    for backend in ("pil", "dali"):
        loading = Loading(batch_size=len(pairs), backend=backend, num_workers=0)
        loader = open_loader(
            pairs, preprocess=PREPROCESS, loading=loading, device=torch.device("cpu")
        )
        pool = Pool(pairs, np.arange(len(pairs)), np.empty(0, np.int64))
        stream = Stream(loader, pool, Replay(), POLICIES, "train", 1)
        (batch,) = stream.batches(0, 1)
        assert batch.valid.all()
        order = np.argsort(batch.samples)
        seen[backend] = batch.images.numpy()[order].astype(int)
    difference = np.abs(seen["pil"] - seen["dali"])
    assert difference.mean() < 0.5 and difference.max() <= 3  # resizing, as in test_dali.py
    plain = Stream(loader, pool, Replay(), {**POLICIES, "dda": AugmentPolicy()}, "train", 1)
    (untouched,) = plain.batches(0, 1)
    before = untouched.images.numpy()[np.argsort(untouched.samples)].astype(int)
    changed = np.abs(before - seen["dali"]).mean(axis=(1, 2, 3)) > 0.3
    wanted = [sample_of(pairs, f"pairs/fake/{n:03d}") for n, (_, w) in REALS.items() if w]
    assert sorted(np.flatnonzero(changed)) == sorted(wanted)


def test_a_partner_of_unusual_chroma_changes_no_fake(pairs: ShardSet) -> None:
    """Such as 4:1:1, which no JPEG of the loader has: with another one the fake would differ."""
    table = pairs.table
    place = table.schema.get_field_index("chroma")
    chroma = ["411"] * len(table)
    unusual = replace(pairs, table=table.set_column(place, "chroma", [chroma]), _columns={})
    partners = partners_of(unusual, ("pairs",))
    assert not partners.quality.any() and not partners.chroma.any()
