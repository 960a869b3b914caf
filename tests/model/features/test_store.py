"""Identity of stored features: what decides whether a file is computed anew."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.features.store import (
    BackboneId,
    FeatureError,
    ShardFile,
    View,
    files_of,
    read_file,
    write_file,
)
from pipeline.augment import AugmentPolicy
from pipeline.params import train_params, view_params
from pipeline.preprocess import Preprocess
from sharding.format import ShardSet
from tests.builders import SMALL_PREPROCESS

BACKBONE = BackboneId(
    network="tiny", options={}, head="timm", blocks=(), mean=(0, 0, 0), std=(1, 1, 1),
    sha256="0" * 64, preprocess=SMALL_PREPROCESS, precision="fp32",
)  # fmt: skip


def with_pairs(shards: ShardSet, quality: int) -> ShardSet:
    """Return the set with all images as pairs of a PNG fake and a JPEG of this quality; 0: in no
    pair.
    """
    is_fake, table = shards.column("label") == 1, shards.table
    number = np.where(is_fake, np.cumsum(is_fake), np.cumsum(~is_fake))
    columns = {
        "group": [f"{n}" if quality else f"{row}" for row, n in enumerate(number)],
        "jpeg_quality": np.where(is_fake, 0, quality or 90),
        "chroma": ["420"] * len(table),
    }
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, [column])
    return replace(shards, table=table, _columns={})


def test_other_partners_of_the_fakes_are_another_identity(old: ShardSet, tmp_path: Path) -> None:
    """The tars are the same: the partners follow from groups, which only the index has."""

    def files(shards: ShardSet, number: int = 1, *, match: bool = True) -> list[ShardFile]:
        augment = {"train": AugmentPolicy(match_pair_jpeg=match), "dda": AugmentPolicy()}
        view = View(number=number, augment=augment, policy="train") if number else View()
        return files_of(tmp_path, BACKBONE, shards, view)

    def same(one: list[ShardFile], other: list[ShardFile]) -> list[bool]:
        alike = [a.id == b.id for a, b in zip(one, other, strict=True)]
        assert alike == [a.path == b.path for a, b in zip(one, other, strict=True)]
        return alike

    apart, paired = with_pairs(old, 0), with_pairs(old, 60)
    sources = [old.names("source", rows)[0] for rows in old.rows_of_shards().values()]
    # `dummy` has no pairs, and the index gives `beta` the policy `dda`, which matches nothing.
    is_same = [source != "alpha" for source in sources]
    assert {*sources} == {"alpha", "beta", "dummy"}
    assert same(files(apart), files(paired)) == is_same
    assert same(files(with_pairs(old, 61)), files(paired)) == is_same
    assert all(same(files(with_pairs(old, 60)), files(paired)))
    assert all(same(files(apart, 0), files(paired, 0)))
    unmatched = files(apart, match=False)
    assert all(same(unmatched, files(paired, match=False)))
    names = [f"{s[:-4]}-{h[:12]}.arrow" for s, h in zip(old.shards, old.shard_sha256, strict=True)]
    assert [file.path.name for file in unmatched] == names  # as in earlier stores
    keys = {"version", "backbone", "shard", "shard_sha256", "view", "seed", "policy"}
    assert all(file.id.keys() == keys for file in unmatched)


def test_a_view_augments_each_image_of_a_tar_for_itself(old: ShardSet) -> None:
    """View v as epoch v - 1. If this changed, features of the old views would be read as those of
    the new ones, because their identity would be the same.
    """
    policy = AugmentPolicy(jpeg=1.0, jpeg_quality=(1, 100))
    augment = {"train": policy, "dda": policy}
    everyone, none = np.arange(len(old)), np.zeros(len(old), np.int64)
    for number in (1, 2, 3):
        view = view_params(old, augment, "train", SMALL_PREPROCESS, 5, number)
        epoch = train_params(old, augment, "train", SMALL_PREPROCESS, 5, number - 1)
        params = view(everyone, none)
        expected = replace(epoch, numbers=view.numbers)(everyone, none)
        assert list(params.rows()) == list(expected.rows())
        for rows in old.rows_of_shards().values():
            assert len(np.unique(params.jpeg[rows])) > len(rows) / 2


def test_a_new_setting_keeps_stored_features() -> None:
    """Its default does what the program did before."""

    @dataclass(frozen=True, kw_only=True)
    class LongerPolicy(AugmentPolicy):
        sepia: float = 0.0

    @dataclass(frozen=True, kw_only=True)
    class LongerPreprocess(Preprocess):
        sharpen: bool = False

    view, policies = View(number=1, policy="train"), (AugmentPolicy, LongerPolicy)
    assert len({view.folder_of(policy(hflip=0.5)) for policy in policies}) == 1
    assert view.folder_of(LongerPolicy(hflip=0.5, sepia=0.1)) != view.folder_of(
        LongerPolicy(hflip=0.5)
    )
    sizes = {"crop_size": 224, "resize_size": 224}
    kinds = (Preprocess(**sizes), LongerPreprocess(**sizes))
    assert len({replace(BACKBONE, preprocess=kind).folder for kind in kinds}) == 1
    sharp = replace(BACKBONE, preprocess=LongerPreprocess(**sizes, sharpen=True))
    assert sharp.folder != replace(BACKBONE, preprocess=kinds[0]).folder


def test_a_file_of_another_kind_is_damaged(tmp_path: Path) -> None:
    """float32 was read as the bytes of float16, and failures that are a list were a traceback."""
    file = ShardFile(path=tmp_path / "a.arrow", shard_code=0, id={"view": 0})
    values = np.arange(6, dtype=np.float16).reshape(3, 2)
    write_file(file, np.arange(3), np.array([True, False, True]), values, {1: "cut off"})
    part = read_file(file)
    assert part.features.tolist() == values.tolist() and part.failures == {1: "cut off"}
    with pa.ipc.open_file(file.path) as source:
        table = source.read_all()
    wide = pa.FixedSizeListArray.from_arrays(pa.array(range(6), pa.float32()), 2)
    holed = pa.array([0, None, 2], pa.int64())
    about = dict(table.schema.metadata)
    (key,) = (key for key in about if key.endswith(b"failures"))
    for wrong, said in (
        (table.set_column(2, "features", wide), "its columns are int64, bool and fixed_size_list"),
        (table.set_column(0, "offset", holed), "a value in it is null"),
        (table.replace_schema_metadata(about | {key: b"[]"}), "has no attribute"),
        (table.replace_schema_metadata(about | {key: b'{"x": "y"}'}), "invalid literal"),
        (table.drop_columns("valid"), "valid"),
    ):
        with pa.ipc.new_file(str(file.path), wrong.schema) as writer:
            writer.write_table(wrong)
        with pytest.raises(FeatureError, match=rf"a\.arrow is damaged \(.*{said}.*; delete it"):
            read_file(file)
