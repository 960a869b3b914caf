"""The shards without our code: as webdataset, DALI and timm read them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from timm.data import create_dataset

from sharding.format import CLASSES, ShardSet

# webdataset leaves the tars it has read open; that is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_webdataset_reads_every_sample(data: Path, old: ShardSet) -> None:
    tars = sorted(str(path) for path in (data / "old").glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        (extension,) = sample.keys() & {"jpg", "png", "webp"}
        Image.open(io.BytesIO(sample[extension])).load()
        found[sample["__key__"]] = CLASSES.index(json.loads(sample["json"])["label"])
    assert found == dict(
        zip(old.table.column("key").to_pylist(), old.column("label").tolist(), strict=True)
    )


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
