"""The table of `sharding show`: the images of a set by source, generator and class."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from click.testing import CliRunner

from sharding.__main__ import main
from sharding.contents import rows_of_set
from sharding.format import CLASSES, ShardSet, read_index


def packed(rows: int, sources: int, generators: int) -> ShardSet:
    """Return a set of random images that has only the columns which are counted."""
    draw = np.random.default_rng(0)
    texts = {"source": sources, "generator": generators, "format": 3}
    columns = {
        name: pa.array([f"{name}{code}" for code in draw.integers(0, count, rows)], pa.string())
        for name, count in texts.items()
    }
    numbers = {"label": 2, "width": 900, "height": 700}
    columns |= {name: draw.integers(0, top, rows, np.int64) for name, top in numbers.items()}
    return ShardSet((), (), (), (), (), pa.table(columns), {}, "")


def test_the_rows_are_those_of_a_count_by_hand() -> None:
    shards = packed(300, 3, 5)
    index = {"sources": {f"source{n}": {"license": f"license {n}"} for n in range(3)}}
    said = {tuple(row[:3]): row for row in rows_of_set(shards, index)}
    images: dict[tuple, list[dict]] = {}
    for image in shards.table.to_pylist():
        key = (image["source"], CLASSES[image["label"]], image["generator"])
        images.setdefault(key, []).append(image)
    assert said.keys() == images.keys() and len(rows_of_set(shards, index)) == len(said)
    for key, here in images.items():
        wide, high = [i["width"] for i in here], [i["height"] for i in here]
        _, _, _, count, pixels, formats, license_name = said[key]
        assert count == len(here)
        assert pixels == f"{min(wide)}-{max(wide)} x {min(high)}-{max(high)}"
        assert sorted(formats.split()) == sorted({i["format"] for i in here})
        assert license_name == f"license {key[0][-1]}"


def test_rows_are_made_only_of_what_is_there() -> None:
    """300 images cannot fill the 30 million combinations of 3,900 names."""
    shards = packed(300, 3_900, 3_900)
    index = {"sources": {f"source{n}": {"license": ""} for n in range(3_900)}}
    assert sum(row[3] for row in rows_of_set(shards, index)) == 300
    assert rows_of_set(packed(0, 1, 1), index) == []


def test_show_prints_the_rows(data: Path) -> None:
    result = CliRunner().invoke(main, ["show", str(data / "val")])
    assert result.exit_code == 0, result.output
    for source, facts in read_index(data / "val")["sources"].items():
        assert source in result.output and facts["license"] in result.output
