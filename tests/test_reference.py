"""Tests that the pages of docs/reference.py agree with the code and the written files."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import evaluate
import recipes
import report.fields
from docs.reference import (
    FILES,
    Field,
    alternatives,
    fields_of,
    is_section,
    pages,
    split_range,
)
from model.checkpoint import META_FILE, find
from model.export import hub
from model.recipe import Recipe
from model.shipped.calibration import Calibrated
from model.shipped.entries import CheckpointEntries
from model.shipped.meta import Meta
from pipeline.preprocess import Preprocess
from sharding.catalog import Catalog, Rule, Source, Table
from sharding.fetch_spec import Fetch, Git
from sharding.format import INDEX_FILE
from tests.builders import ROOT, train_tiny

KEYS = (ROOT / "docs/recipe-keys.md").read_text(encoding="utf-8")
FIELDS = (ROOT / "docs/fields.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pages())
def test_a_page_is_up_to_date(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == pages()[name], "type `make reference`, and commit the page"


def tables_of(kind: type) -> Iterator[tuple[str, type]]:
    """Yield each table of a recipe with its dataclass, without the code of the generator."""
    for name, hint in typing.get_type_hints(kind).items():
        inside = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        if inside:
            yield f"augment.{'NAME'}" if name == "augment" else name, inside[0]


@pytest.mark.parametrize(("table", "kind"), [("Top level", Recipe), *tables_of(Recipe)])
def test_every_recipe_key_is_on_the_page(table: str, kind: type) -> None:
    heading = table if kind is Recipe else f"[{table}]"
    section = KEYS.split(f"## {heading}\n")[1].partition("\n## ")[0]
    keys = {field.name for field in dataclasses.fields(kind)}
    if kind is Recipe:
        keys = {"name", "extends"}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == keys


@pytest.mark.parametrize("kind", [Catalog, Source, Rule, Table, Fetch, Git])
def test_every_catalog_key_is_on_the_page(kind: type) -> None:
    section = pages()["catalog-keys.md"].split(f"## {kind.__name__}\n")[1].partition("\n## ")[0]
    keys = {field.name for field in dataclasses.fields(kind)}
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.M)) == keys


PHASE_1 = dataclasses.asdict(recipes.load(Recipe, recipes.FOLDER / "phase1.toml"))
PHASE_1 |= {"augment.NAME": PHASE_1["augment"]["train"], "features": {}}

WITH = {
    "blocks": {"head": "class_tokens", "freeze_backbone": True},
    "crop_size": {"resize_size": 5000},
    "lr": {"min_lr": 0},
}
"""Recipe key -> other keys that a value of this key requires."""

RANGES = [
    pytest.param(Preprocess if table == "preprocess" else kind, table, field, id=field.key)
    for table, kind in tables_of(Recipe)
    for field in fields_of(kind)
    if re.search(r"\d", split_range(field.meaning)[1])
]
"""Each recipe key with a range in numbers. `Preprocess` checks the ranges of `preprocess`."""


def limits_of(text: str) -> tuple[list[float], list[float]]:
    """Return values at or just inside the ends of a range in words, and values just outside."""
    inside, outside = [], []
    step = 1e-6
    if between := re.fullmatch(r"(\S+) to (\S+)", text):
        text = f"at least {between[1]}, at most {between[2]}"
    for word, number in re.findall(r"(at least|at most|above|below) ([\d.-]+)", text):
        at, sign = float(number), 1 if word in ("at least", "above") else -1
        if word.startswith("at"):
            inside.append(at)
            outside.append(at - sign * step)
        else:
            inside.append(at + sign * step)
            outside.append(at)
    return inside, outside


def test_limits_of_a_range_in_words() -> None:
    assert limits_of("0 to 1") == ([0, 1], [-1e-6, 1 + 1e-6])
    assert limits_of("above 0, below 0.5") == ([1e-6, 0.5 - 1e-6], [0, 0.5])
    assert limits_of("at least -1") == ([-1], [-1 - 1e-6])


def value_of(field: Field, number: float) -> Any:
    """Convert a number near a limit to the field's type. Integers are rounded away from it."""
    if int in (field.kind, *alternatives(field.kind), *typing.get_args(field.kind)):
        number = math.floor(number) if number < round(number) else math.ceil(number)
    if field.key == "repeats":
        return {"x": number}
    is_list = typing.get_origin(field.kind) is tuple
    return [number] * (1 if field.key == "blocks" else 2) if is_list else number


@pytest.mark.parametrize(("kind", "table", "field"), RANGES)
def test_a_range_on_the_page_is_the_range_of_the_code(kind: type, table: str, field: Field) -> None:
    inside, outside = limits_of(split_range(field.meaning)[1])
    assert inside, f"{field.meaning!r} does not end in a range that this test can parse"
    others = PHASE_1[table] | WITH.get(field.key, {})
    for number in inside:
        recipes.build(kind, others | {field.key: value_of(field, number)}, "here")
    for number in outside:
        with pytest.raises(recipes.RecipeError):
            recipes.build(kind, others | {field.key: value_of(field, number)}, "here")


def differences(value: Any, kind: Any, where: str = "") -> list[str]:
    """List the fields that only a parsed JSON value has, and those that only its type has."""
    for one in alternatives(kind):
        origin, arguments = typing.get_origin(one), typing.get_args(one)
        if is_section(one) and isinstance(value, dict):
            known = {field.key: field for field in fields_of(one)}
            wrong = [f"{where}.{key} is not on the page" for key in value.keys() - known.keys()]
            wrong += [f"{where}.{key} is not in the file" for key, field in known.items()
                      if key not in value and not field.may_be_absent]  # fmt: skip
            for key in value.keys() & known.keys():
                wrong += differences(value[key], known[key].kind, f"{where}.{key}")
            return sorted(wrong)
        if isinstance(value, dict) and arguments and origin not in (list, tuple):
            inner = [differences(v, arguments[1], f"{where}.{key}") for key, v in value.items()]
            return [difference for part in inner for difference in part]
        if isinstance(value, list) and origin in (list, tuple):
            inner = [differences(v, arguments[0], f"{where}[]") for v in value]
            return [difference for part in inner for difference in part]
    return []


def rows_on_the_page(kind: type) -> set[str]:
    return {field.key for field in fields_of(kind) if f"| `{field.key}` |" in FIELDS}


@pytest.mark.parametrize("file", FILES)
def test_every_field_is_on_the_page(file: str) -> None:
    assert rows_on_the_page(FILES[file]) == {field.key for field in fields_of(FILES[file])}


@pytest.mark.parametrize(
    ("read", "whole"),
    [
        (CheckpointEntries, Meta), (Calibrated, Meta),
        (hub.ReportEntries, report.fields.Report), (hub.SetFigures, report.fields.SetReport),
        (hub.Figures, report.fields.Figures),
    ],
)  # fmt: skip
def test_what_is_read_of_a_file_is_in_its_layout(read: type, whole: type) -> None:
    """A reader checks only what it needs, so that other entries may change."""
    assert typing.get_type_hints(read).keys() <= typing.get_type_hints(whole).keys()


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a phase 1 run, and a phase 2 run from it with replay. Return the folder of runs."""
    runs = train_tiny(data, tmp_path_factory.mktemp("runs"))
    phase_2 = ['name="two"', 'run.init_from="tiny"', 'replay.sets=["old"]', 'replay.ratio="1:2"',
               'data.train=["new"]', 'data.validate=["val", "old"]']  # fmt: skip
    return train_tiny(data, runs, *phase_2)


def test_a_new_index_has_the_fields_of_the_page(data: Path) -> None:
    for path in data.glob(f"*/{INDEX_FILE}"):
        assert not differences(json.loads(path.read_text(encoding="utf-8")), FILES["index.json"])


@pytest.mark.parametrize("run", ["tiny", "two"])
def test_a_new_checkpoint_has_the_fields_of_the_page(trained: Path, run: str) -> None:
    meta = json.loads((find(trained, trained / run) / META_FILE).read_text(encoding="utf-8"))
    assert (meta["compared"] is not None) == (run == "two")
    assert not differences(meta, FILES["meta.json"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "detectors").glob(f"*/{META_FILE}")), ids=lambda path: path.parent.name
)
def test_a_detector_that_ships_has_no_field_that_the_page_lacks(path: Path) -> None:
    """The recipe of a shipped detector may lack keys that were added later."""
    wrong = differences(json.loads(path.read_text(encoding="utf-8")), FILES["meta.json"])
    assert not [one for one in wrong if "not on the page" in one]


def test_a_new_report_has_the_fields_of_the_page(data: Path, trained: Path, tmp_path: Path) -> None:
    arguments = ["--shards", "val", "--data", str(data), "--out", str(tmp_path),
                 "--checkpoint", str(trained / "two"), "--robustness", "2"]  # fmt: skip
    result = CliRunner().invoke(evaluate.main, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["sets"]["val"]["robustness"]["codec_swap"]
    assert not differences(written, FILES["report.json"])
