"""Read the scores of somebody else's detector from a CSV table, as the content of a scores file.

Main entry: `read_scores(file, names, data, reference_reals, catalogs)`. It needs neither network
nor images.

- `file`: `Path` of the CSV table: columns separated by commas, a row per image.
- `names`: names of the shard sets that were scored (folders in `data`, a `Path` or `UPath`); empty:
  the table says everything.
- `reference_reals`, `catalogs`: with `names`, as in `Options` of `model/evaluation/plan.py`. The
  scores of the reference's real images are in the table, too.

It returns the tables, one a set, and the description that `write_scores()` of
`model/evaluation/scores.py` writes to a scores file; from that one, `report_on()` of
`model/evaluation/run.py` makes the report. Columns of the CSV table:

- `key` or `path`: the name of the image, once in each set.
- `score` or `probability`: the probability of fake, 0 to 1. Empty or NaN: the detector gave none.
- `label`: `real` or 0, `fake` or 1. It may be missing if `names` are given.
- `set`, `source`, `generator`, `group`: optional, without `names` only. By default all images are
  in the set `SET`, of one source with the name of the file, and each is a group of its own.

Other columns are named in the log and not used. With `names`, an image is the sample with this key,
with this path below the raw folder, or whose tar and key the path ends with, as `predict.py` writes
them. Its label, source, generator and group are those of the set. An image of the set without a row
has no score, and a row of no image is counted in the log. A set that the catalogs name as reference
is one only if the table has a row of its real images.

The scores are neither calibrated nor changed: 0.5 decides. `ScoresError` (a `ValueError`) is raised
for a table that cannot be used; the message names the line.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

import console
from installed import git_commit
from model.adapters.detector import logits_from, meta_of
from model.evaluation.plan import Reals, choose_references, open_reals
from model.evaluation.scores import SCORES_SCHEMA, ScoresError, rows_of
from model.score import Scores
from model.verdict import CALIBRATION_KEYS
from sharding.csv_rows import csv_rows, ends_of, listed, short
from sharding.format import CLASSES, ShardSet, open_shards
from storage import AnyPath, sha256_of

NAMES, SCORES = ("key", "path"), ("score", "probability")
"""Names of the columns with the name and the score of an image; the first existing one is used."""

OPTIONAL = ("set", "source", "generator", "group")

LABELS = {"real": 0, "0": 0, "0.0": 0, "fake": 1, "1": 1, "1.0": 1}

SET = "images"
"""Name of the set if a table names none: always the same, so that tables can be compared."""

NO_SCORE = "the table has no score for it"


class _Row(NamedTuple):
    """One image of the table."""

    line: int
    name: str
    label: int | None
    score: float  # NaN: no score
    about: Mapping[str, str]  # the columns `OPTIONAL`


def read_scores(
    file: Path,
    names: Sequence[str],
    data: AnyPath,
    reference_reals: str | None = None,
    catalogs: Sequence[Path] = (),
) -> tuple[list[pa.Table], dict[str, Any]]:
    """Return the scores in the table `file`: a table for each set, and the metadata of the scores.

    Raises:
        ScoresError: a column is missing, a label or score cannot be read, an image has two rows, or
            no row is of an image of the sets, or of a real image of the set `reference_reals`.
        ValueError, OSError: a set, catalog or file cannot be read, or the set `reference_reals` has
            no real images.
    """
    rows = list(_rows(file, needs_label=not names))
    sets = {name: open_shards([data / name]) for name in names}
    references = choose_references(data, sets, reference_reals, catalogs) if names else {}
    others = {reference["set"] for reference in references.values()} - sets.keys()
    reals = {name: open_reals(data, name).shards for name in sorted(others)}
    parts = _of_sets(file, rows, sets, reals) if sets else _of_table(file, rows)
    for name in sorted(reals.keys() - parts.keys()):
        said = f"{file}: no row is of a real image of {name}"
        if name == reference_reals:
            raise ScoresError(f"{said}, the set of --reference-reals; add their scores")
        console.log.info("%s, which the catalog names as reference", said)
    digest = sha256_of(file)
    meta = meta_of("scores", file.stem, sha256=digest)
    about = {
        "checkpoint": str(file),
        "run": meta["run"],
        "step": meta["step"],
        "detector": meta["detector"],
        "commit": git_commit(),
        "precision": "not known: scores of a table",
        "backend": "none",
        **{key: meta[key] for key in CALIBRATION_KEYS},
        "subset": None,
        "sets": {
            name: {
                "index_sha256": sets[name].sha256 if sets else digest,
                "split": part.column("split")[0].as_py(),
                "known_generators": [],
                "robustness": None,
                "reference_reals": _if_scored(references.get(name), parts),
            }
            for name, part in parts.items()
            if name not in reals
        },
        "trained_on": [],
        "maybe_trained_on": [],
    }
    return [*parts.values()], about


def _if_scored(reference: Reals | None, parts: Mapping[str, pa.Table]) -> Reals | None:
    return reference if reference and reference["set"] in parts else None


def _rows(file: Path, *, needs_label: bool) -> Iterator[_Row]:
    """Yield the rows of the table.

    Raises:
        ScoresError: the table is damaged, lacks a column, or has a wrong label or score.
    """
    with csv_rows(file, ScoresError) as (columns, rows):
        name, score = (_first(columns, known) for known in (NAMES, SCORES))
        missing = [] if name else ["key or path"]
        missing += [] if score else ["score or probability"]
        missing += ["label"] if needs_label and "label" not in columns else []
        if missing:
            raise ScoresError(
                f"{file} has the columns {listed(columns) or 'none'}; add or rename: "
                f"{'; '.join(missing)} (in lower case, separated by commas)"
            )
        used = {name, score, "label", *(OPTIONAL if needs_label else ())}
        if unused := [column for column in columns if column not in used]:
            console.log.info("%s: columns not used: %s", file, listed(unused))
        for line, row in rows:
            where = f"{file}, line {line}"
            label = _label(row["label"], where) if "label" in columns else None
            about = {column: row.get(column, "") for column in OPTIONAL}
            if not row[name]:
                raise ScoresError(f"{where}: {name} is empty, expected the name of an image")
            yield _Row(line, row[name], label, _score(row[score], where), about)


def _first(columns: Sequence[str], known: Sequence[str]) -> str:
    return next((column for column in known if column in columns), "")


def _label(text: str, where: str) -> int:
    if text.lower() not in LABELS:
        raise ScoresError(f"{where}: label is {short(text)}, expected real or 0, or fake or 1")
    return LABELS[text.lower()]


def _score(text: str, where: str) -> float:
    if not text:
        return math.nan
    try:
        score = float(text)
    except ValueError:
        score = math.inf
    if math.isinf(score) or score < 0 or score > 1:
        raise ScoresError(
            f"{where}: score is {short(text)}, expected the probability of fake, 0 to 1 (of logits "
            "take the sigmoid first)"
        )
    return score


def _of_table(file: Path, rows: Sequence[_Row]) -> dict[str, pa.Table]:
    """Return the rows of `scores.parquet` by set; the table itself describes the images."""
    if not rows:
        raise ScoresError(f"{file} has no row, expected one per image")
    by_set: dict[str, dict[str, _Row]] = {}
    for row in rows:
        of_set = by_set.setdefault(row.about["set"] or SET, {})
        first = of_set.setdefault(row.name, row)
        if first is not row:
            _refuse_second(file, row, first)
    return {name: _table(file.stem, name, [*of.values()]) for name, of in by_set.items()}


def _refuse_second(file: Path, row: _Row, first: _Row) -> None:
    raise ScoresError(
        f"{file}, line {row.line}: {short(row.name)} has a row already, line {first.line}; "
        "expected one per image"
    )


def _table(stem: str, name: str, rows: Sequence[_Row]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "set": [name] * len(rows),
        "key": [row.name for row in rows],
        # The bytes are unknown. A hash of the name is equal in two tables, so that they can be
        # compared.
        "sha256": [hashlib.sha256(row.name.encode()).digest() for row in rows],
        "source": [row.about["source"] or stem for row in rows],
        "generator": [row.about["generator"] or CLASSES[row.label or 0] for row in rows],
        "split": ["test"] * len(rows),
        "group": [row.about["group"] or row.name for row in rows],
        "origin": [row.name for row in rows],
        "label": [row.label for row in rows],
        "valid": [not math.isnan(row.score) for row in rows],
        "error": [NO_SCORE if math.isnan(row.score) else "" for row in rows],
    }
    scores = np.array([row.score for row in rows], np.float64)
    columns["logit"] = _or_none(logits_from(scores))
    columns["probability"] = _or_none(scores)
    arrays = [pa.array(columns[field.name], field.type) for field in SCORES_SCHEMA]
    return pa.table(arrays, schema=SCORES_SCHEMA)


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _of_sets(
    file: Path,
    rows: Sequence[_Row],
    sets: Mapping[str, ShardSet],
    reals: Mapping[str, ShardSet],
) -> dict[str, pa.Table]:
    """Return the rows of `scores.parquet` of each set, with the scores of the table. Of `reals`,
    the real images of other sets, only those sets that have a row in the table.
    """
    opened = {**sets, **reals}
    samples: dict[str, dict[str, int]] = {}  # key or path -> the sample in each set
    for name, shards in opened.items():
        for column in ("key", "origin"):
            for sample, text in enumerate(shards.table.column(column).to_pylist()):
                samples.setdefault(text, {}).setdefault(name, sample)
    depth = max((text.count("/") + 1 for text in samples), default=0)
    scored: dict[tuple[str, int], _Row] = {}
    strangers = []
    for row in rows:
        if not (of := _samples_of(row.name, samples, depth)):
            strangers.append(row)
        for name, sample in of.items():
            first = scored.setdefault((name, sample), row)
            if first is not row:
                _refuse_second(file, row, first)
            label = int(opened[name].column("label")[sample])
            if row.label not in (None, label):
                raise ScoresError(
                    f"{file}, line {row.line}: {short(row.name)} is {CLASSES[row.label or 0]}, but "
                    f"{CLASSES[label]} in the set {name}"
                )
    of_rows = {name for name, _ in scored}
    if of_rows.isdisjoint(sets):
        raise ScoresError(
            f"{file}: no row is of an image of {', '.join(sets)}; the first is "
            f"{short(rows[0].name)}, expected keys or paths such as {_example(sets)}" if rows else
            f"{file} has no row, expected one per image"
        )  # fmt: skip
    used = [name for name in opened if name in sets or name in of_rows]
    if strangers:
        known = (name if name in sets else f"the real images of {name}" for name in used)
        console.log.warning(
            "%s: %s of no image of %s, not used (first: line %d, %s)",
            file, console.counted(len(strangers), "row"), ", ".join(known),
            strangers[0].line, short(strangers[0].name),
        )  # fmt: skip
    return {name: _scored(name, opened[name], scored) for name in used}


def _example(sets: Mapping[str, ShardSet]) -> str:
    """Return the key and the path of a sample."""
    first = next(iter(sets.values())).table.slice(0, 1)
    return " or ".join(short(first.column(name)[0].as_py()) for name in ("key", "origin"))


def _samples_of(
    name: str, samples: Mapping[str, Mapping[str, int]], depth: int
) -> Mapping[str, int]:
    """Return the sample in each set that the name of an image in a table is for; no name in
    `samples` has more than `depth` parts.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    ends = (end for _start, end in ends_of(path.parts, depth))
    keys = [path.stem] if path.parent.suffix == ".tar" else []
    texts = itertools.chain([name], ends, keys)
    return next((samples[text] for text in texts if text in samples), {})


def _scored(name: str, shards: ShardSet, scored: Mapping[tuple[str, int], _Row]) -> pa.Table:
    scores = np.full(len(shards), np.nan)
    for sample in range(len(shards)):
        if row := scored.get((name, sample)):
            scores[sample] = row.score
    good = np.flatnonzero(~np.isnan(scores))
    table = rows_of(
        name,
        shards,
        Scores(
            samples=good,
            labels=shards.column("label")[good].astype(np.int64),
            logits=logits_from(scores[good]).astype(np.float32),
            failures=dict.fromkeys(np.flatnonzero(np.isnan(scores)).tolist(), NO_SCORE),
        ),
        1.0,
    )
    at = table.column_names.index("probability")  # logits are rounded: use the table's numbers
    exact = pa.array(_or_none(scores), pa.float64())
    return table.set_column(at, SCORES_SCHEMA.field("probability"), exact)
