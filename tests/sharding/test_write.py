"""Tests of the shard format with other readers: webdataset, DALI and timm."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from timm.data import create_dataset

from sharding.catalog import read_catalog
from sharding.format import CLASSES, ShardSet, open_shards
from tests.builders import ROOT, build_all, encode, photo

# webdataset does not close the tars that it reads, which is not a fault of our code.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_webdataset_reads_every_sample(data: Path, old: ShardSet) -> None:
    tars = sorted(str(path) for path in (data / "old").glob("*.tar"))
    by_key = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        (extension,) = sample.keys() & {"jpg", "png", "webp"}
        Image.open(io.BytesIO(sample[extension])).load()
        by_key[sample["__key__"]] = CLASSES.index(json.loads(sample["json"])["label"])
    assert by_key == dict(
        zip(old.table.column("key").to_pylist(), old.column("label").tolist(), strict=True)
    )


def test_the_loop_of_the_page_gets_every_image_and_label(data: Path, old: ShardSet) -> None:
    page = (ROOT / "docs/shards.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)[0]
    tars = sorted(str(path) for path in (data / "old").glob("*.tar"))
    read: list[tuple[tuple[int, int], int]] = []
    for here, then in (
        ('"phase1/tiny_genimage-train-00000.tar"', repr(tars)),
        ('    image, about["cls"]', '    read.append((image.size, about["cls"]))'),
    ):
        assert here in code
        code = code.replace(here, then)
    exec(code, {"read": read})
    columns = (old.column(name).tolist() for name in ("width", "height", "label"))
    assert sorted(read) == sorted(((w, h), label) for w, h, label in zip(*columns, strict=True))


def test_dali_reads_every_sample_through_our_idx(data: Path, old: ShardSet) -> None:
    tars = sorted(str(path) for path in (data / "old").glob("*.tar"))

    @pipeline_def(batch_size=len(old), num_threads=2, device_id=None)
    def read():
        image, meta = fn.readers.webdataset(
            paths=tars, index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["jpg;png;webp", "json"], missing_component_behavior="error",
        )  # fmt: skip
        return fn.decoders.image(image, output_type=types.RGB), meta

    pipe = read()
    pipe.build()
    images, metas = pipe.run()
    sizes = sorted(np.asarray(image).shape[:2] for image in images)
    expected = zip(old.column("height").tolist(), old.column("width").tolist(), strict=True)
    assert sizes == sorted(expected)
    labels = [json.loads(np.asarray(meta).tobytes())["label"] for meta in metas]
    assert labels.count("fake") == int(old.column("label").sum())


def test_timm_reads_every_sample_with_its_label(data: Path, old: ShardSet) -> None:
    reader = create_dataset("wds/", root=str(data / "old"), split="train", batch_size=1)
    assert len(reader) == len(old)
    targets = [target for _image, target in reader]
    assert sorted(targets) == sorted(old.column("label").tolist())


NAMES = ["a.b.c.jpg", ".hidden.not.jpg", "ünï çödé 漢字.jpg", "x" * 180 + ".jpg", "quo'te\".jpg"]


def test_any_file_name_is_stored_and_read_back(tmp_path: Path) -> None:
    """Names with dots, spaces, other scripts, quotes, or more than the 100 characters of a tar."""
    for number, name in enumerate(NAMES):
        path = tmp_path / "raw/s/real" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(number)))
    (tmp_path / "c.toml").write_text(
        '[sets]\nmine = "train"\n[sources.s]\nlicense = "x"\nset = "mine"\nreal = ["real"]\n'
    )
    build_all(tmp_path / "raw", tmp_path / "out", catalog=read_catalog([tmp_path / "c.toml"]))
    tars = [str(path) for path in (tmp_path / "out/mine").glob("*.tar")]
    by_key = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        by_key[json.loads(sample["json"])["origin"]] = sample["jpg"]
    shown = [name for name in NAMES if not name.startswith(".")]
    assert by_key == {
        f"s/real/{name}": (tmp_path / "raw/s/real" / name).read_bytes() for name in shown
    }
    rows = open_shards([tmp_path / "out/mine"]).table.column("origin").to_pylist()
    assert sorted(rows) == sorted(by_key)
