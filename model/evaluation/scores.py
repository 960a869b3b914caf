"""Write and read `scores.parquet`: the score of every image of an evaluation, from which its report
can be recomputed without the network.

Main entries (each `path` is a `Path`):

- `rows_of(name, shards, scores, temperature)` returns the rows of one set, an Arrow table with one
  row per image and the columns below. It takes the set's name, the opened set (`ShardSet`, from
  `open_shards([folder])`), its `Scores` (from `score_shards()` of `scoring.py` or `score_set()` of
  `model/score.py`) and the detector's temperature (1.0: none). It raises `ValueError` if the scores
  and failures together do not have each image of `shards` exactly once.
- `write_scores(path, parts, evaluation)` writes a list of such tables to the file `path`, and with
  them `evaluation`, the dict below. Leave out `scores_version`: it is added. It returns nothing.
- `read_scores(path)` returns a `ScoreTable`: `table` (the rows, an Arrow table) and `evaluation`
  (the dict). Its `numbers(name)` returns a column of numbers as an array; `codes(name)` returns a
  column of texts as integer codes and the list of the texts. It raises `ScoresError` for another
  kind of file, another version or a damaged file, and `OSError` if the file cannot be read.

The columns (`SCORES_SCHEMA`) are `set`, `key`, `sha256`, `source`, `generator`, `split`, `group`,
`origin`, `label` (0 real, 1 fake), `logit` (logit of fake minus logit of real, before the
temperature), `probability` (of fake, after it), `valid` (False: the image got no score) and `error`
(why not, else ""). In a row that is not valid, `logit` and `probability` are null, which
`numbers()` returns as NaN.

The dict is stored in the file metadata as JSON under `evaluation`; `Evaluation` has its fields.

For an ONNX file, `checkpoint` is its path, and `run` and `step` are those of the exported
checkpoint. For a CSV table (`model/score_tables/csv_table.py`) without a shard set, `sha256` in a
row is that of the image's name, and `index_sha256` that of the table. For the kinds hf, timm and
file, `checkpoint` is the name that the user typed, `run` the name of the detector, and `step` 0.

A file of version 2 is read too: it has one `reference_reals` for all sets, with the flag `for_all`
(false: of those without real images only).

A set of which only the real images are used, as reference, is not in `sets`. For it, score only
`reals = shards.take(np.flatnonzero(shards.column("label") == 0))`, and pass `reals` to `rows_of()`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import TypedDict  # pydantic needs this one up to Python 3.11

from checked import checked
from escape import reason_of
from installed import command
from model.score import Scores
from model.shipped.calibration import Calibrated
from model.verdict import probability
from sharding.format import (
    SAMPLES_SCHEMA,
    ShardSet,
    codes_of,
    numbers_of,
    range_fault,
    table_from,
)
from storage import MAX_TABLE_BYTES, parse_json, read_plain, write_atomically

SCORES_VERSION = 3
SCORES_FILE = "scores.parquet"

MEASURE_AGAIN = f"measure the checkpoint again with `{command('evaluate')}`"
"""End of an error on a file of an evaluation."""

_name = pa.dictionary(pa.int32(), pa.string())
SCORES_SCHEMA = pa.schema(
    [
        ("set", _name),
        *(SAMPLES_SCHEMA.field(name) for name in (
            "key", "sha256", "source", "generator", "split", "group", "origin", "label",
        )),
        ("logit", pa.float32()),  # fake minus real, before the temperature; null if invalid
        ("probability", pa.float64()),  # of fake, after the temperature; null if invalid
        ("valid", pa.bool_()),  # False where the image could not be decoded
        ("error", _name),  # why invalid; empty if valid
    ]
)  # fmt: skip


class Subset(TypedDict):
    """List of samples given with `--subset`."""

    file: str
    """Name of the list."""
    sha256: NotRequired[str]
    """SHA-256 of the list."""
    samples: int
    """Samples that were scored."""


class ReferenceReals(TypedDict):
    """Another set, whose real images give the false-positive rate."""

    set: str
    """Name of the set."""
    why: str
    """What chose the set: the option or the catalog."""


class Identity(TypedDict):
    """Detector that was measured."""

    kind: str
    """`checkpoint`, `onnx`, `hf`, `timm`, `file` or `scores` (a CSV table of scores)."""
    name: str
    """Name of the checkpoint's folder, of the file or of the repository."""
    sha256: NotRequired[str]
    """SHA-256 of the weights or of the file."""
    revision: NotRequired[str]
    """Commit of the repository."""
    fake_labels: NotRequired[list[str]]
    """Labels that mean AI-generated."""


class SetEntry(TypedDict):
    """One set of an evaluation."""

    index_sha256: str
    """Hash of the set."""
    split: str
    """Split of the set."""
    known_generators: list[str]
    """Generators of a test set of which training had other images."""
    robustness: dict[str, Any] | None
    """Result of `codec_swap.report_robustness`. None: not measured."""
    reference_reals: ReferenceReals | None
    """Reference real images. None: the set's own."""


class Evaluation(Calibrated):
    """What the metadata of the file say about the evaluation."""

    scores_version: int
    """`SCORES_VERSION`."""
    checkpoint: str
    """Path of the checkpoint or file, or the name of the detector that the user typed."""
    run: str
    """Name of the checkpoint's run, or of the detector."""
    step: int
    """Training step of the checkpoint."""
    detector: Identity
    """Detector that was measured."""
    commit: str
    """Commit of this program."""
    precision: str
    """Precision of the network, such as `fp32`, in words."""
    backend: str
    """Decoder and resize, such as `pil`."""
    subset: Subset | None
    """List of samples. None: whole sets."""
    sets: dict[str, SetEntry]
    """Each set by its name, in the order of the request."""
    trained_on: list[str]
    """Sets that the checkpoint was trained on."""
    maybe_trained_on: list[str]
    """Other sets that have the name of one."""


class ReferenceOfVersion2(ReferenceReals):
    """Reference real images in a file of version 2."""

    for_all: bool
    """Whether the set is also the reference of sets with real images."""


class EvaluationOfVersion2(TypedDict):
    """Metadata of a file of version 2, as far as its layout was another."""

    sets: dict[str, dict[str, Any]]
    """Each set by its name."""
    reference_reals: ReferenceOfVersion2 | None
    """Reference real images of all sets. None: none were needed."""


class ScoresError(ValueError):
    """Raised for scores that cannot be read or compared; the message gives the reason."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Rows of `SCORES_SCHEMA` and the metadata of their evaluation (see the module docstring)."""

    table: pa.Table
    evaluation: Mapping[str, Any]

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """Return a numeric column as an array (N,); null becomes NaN."""
        column = self.table.column(name)
        return numbers_of(column.fill_null(float("nan")) if column.null_count else column)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a text column as (code per row, int32 (N,); name of each code)."""
        return codes_of(self.table.column(name))

    def of_set(self, name: str) -> np.ndarray:
        """Return whether each row is of set `name`, bool (N,)."""
        sets, names = self.codes("set")
        return sets == (names.index(name) if name in names else -1)


def rows_of(name: str, shards: ShardSet, scores: Scores, temperature: float) -> pa.Table:
    """Build the table rows of set `name`, one per sample of `shards`, in the order of `shards`.

    Raises:
        ValueError: scores and failures do not cover the samples of `shards` exactly once (a bug of
            the caller).
    """
    covered = np.sort(np.concatenate([scores.samples, [*scores.failures]]).astype(np.int64))
    if not np.array_equal(covered, np.arange(len(shards))):
        raise ValueError(f"{len(covered)} scores for the {len(shards)} samples of {name}")
    logits = np.zeros(len(shards), np.float32)
    logits[scores.samples] = scores.logits
    valid = np.ones(len(shards), np.bool_)
    valid[[*scores.failures]] = False
    code_of = {"": 0}
    errors = np.zeros(len(shards), np.int32)
    for sample, reason in sorted(scores.failures.items()):
        errors[sample] = code_of.setdefault(reason, len(code_of))
    columns = {
        "set": _constant(name, len(shards)),
        "logit": _floats(logits, valid),
        "probability": _floats(probability(logits, temperature), valid),
        "valid": pc.cast(_array(valid.view(np.uint8)), pa.bool_()),
        "error": pa.DictionaryArray.from_arrays(_array(errors), [*code_of]),
    }
    return pa.table(
        [columns.get(field.name, _column(shards, field.name)) for field in SCORES_SCHEMA],
        schema=SCORES_SCHEMA,
    )


def _column(shards: ShardSet, name: str) -> pa.ChunkedArray | None:
    return shards.table.column(name) if name in shards.table.column_names else None


def _array(values: np.ndarray) -> pa.Array:
    """Convert a NumPy array to an Arrow array. `pyarrow.array` is avoided: it imports pandas."""
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)]
    )


def _floats(values: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Convert floats to an Arrow array with null where `valid` is False."""
    column = _array(np.ascontiguousarray(values))
    return pc.if_else(pc.cast(_array(valid.view(np.uint8)), pa.bool_()), column, None)


def _constant(name: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(_array(np.zeros(count, np.int32)), [name])


def write_scores(path: Path, parts: Sequence[pa.Table], evaluation: Mapping[str, Any]) -> None:
    """Write `parts` (tables of `rows_of`) to `path`. Equal input gives equal bytes."""
    text = json.dumps({"scores_version": SCORES_VERSION, **evaluation})
    table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
    table = table.replace_schema_metadata({"evaluation": text})
    write_atomically(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def _fault_in_rows(table: pa.Table) -> str:
    """Return what is wrong in the rows of a scores file, or "" if a report can use all."""
    for name in ("set", "valid", "error"):
        if table.column(name).null_count:
            return f"{name} is null in a row"
    return range_fault(table) or range_fault(table.filter(table.column("valid")), _OF_VALID)


_OF_VALID = {"logit": (-sys.float_info.max, sys.float_info.max), "probability": (0.0, 1.0)}
"""Smallest and largest value of columns of a valid row."""


def read_scores(path: Path) -> ScoreTable:
    """Read a file of `write_scores`.

    Raises:
        ScoresError: not a scores file, a damaged one, or one of another version, or its metadata
            cannot be used.
        OSError: the file cannot be read.
    """
    data = read_plain(path, MAX_TABLE_BYTES)
    try:
        table = table_from(data)
        evaluation = parse_json((table.schema.metadata or {})[b"evaluation"])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:  # OSError: pyarrow too
        raise ScoresError(
            f"{path} is not a file of scores that `{command('evaluate')}` writes ({error})"
        ) from error
    if not isinstance(evaluation, dict):
        raise ScoresError(
            f"{path} is not a file of scores that `{command('evaluate')}` writes (no evaluation)"
        )
    if evaluation.get("scores_version") not in (2, SCORES_VERSION):
        raise ScoresError(
            f"{path} has scores version {evaluation.get('scores_version')}, expected "
            f"{SCORES_VERSION}; {MEASURE_AGAIN}"
        )
    try:
        table = table.select(SCORES_SCHEMA.names).cast(SCORES_SCHEMA)
    except (pa.ArrowException, KeyError, ValueError) as error:
        reason = reason_of(error)
        raise ScoresError(
            f"{path} lacks a column of scores, or has one of another type ({reason}); "
            f"{MEASURE_AGAIN}"
        ) from error
    if fault := _fault_in_rows(table):
        raise ScoresError(f"{path} has a row that cannot be used ({fault}); {MEASURE_AGAIN}")
    try:
        if evaluation["scores_version"] == 2:
            evaluation = _of_version_2(ScoreTable(table, evaluation))
        checked(Evaluation, evaluation)
    except ValueError as error:
        raise ScoresError(
            f"{path} has metadata that cannot be used ({error}); {MEASURE_AGAIN}"
        ) from error
    return ScoreTable(table, evaluation)


def _of_version_2(scores: ScoreTable) -> dict[str, Any]:
    """Return metadata of version 2 in the present layout.

    Raises:
        ValueError: the part with another layout cannot be used.
    """
    old = checked(EvaluationOfVersion2, scores.evaluation)
    evaluation = {**scores.evaluation, "scores_version": SCORES_VERSION}
    del evaluation["reference_reals"]
    reference = old["reference_reals"]
    evaluation["sets"] = {
        name: {**entry, "reference_reals": None} for name, entry in old["sets"].items()
    }
    for name, entry in evaluation["sets"].items():
        if reference is None or reference["set"] == name:
            continue
        if reference["for_all"] or 0 not in scores.numbers("label")[scores.of_set(name)]:
            entry["reference_reals"] = {"set": reference["set"], "why": reference["why"]}
    return evaluation
