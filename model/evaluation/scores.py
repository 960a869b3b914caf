"""`scores.parquet`: what a checkpoint said of each image, so that every figure can be found again
without the network.

One row per sample of the sets that were measured, in their order; see `SCORES_SCHEMA`. The metadata
of the file holds, under `evaluation`, a JSON object with what else a report needs:

    {"scores_version": 2, "checkpoint": path, "run": name, "step": n, "commit": commit,
     "detector": {"kind": checkpoint, onnx, hf, timm or file, "name": name, "sha256": hash of its
                  weights or file, "revision": commit, "fake_labels": [label, ...]},   # as it has
     "precision": "fp32", "backend": "pil",
     "temperature": t, "threshold": p, "calibration": null or as in meta.json,
     "subset": null or {"file": name, "sha256": hash, "samples": n},
     "sets": {set: {"index_sha256": hash, "split": split,     # in the order they were asked for
                    "robustness": null or as model.codec_swap.report_robustness says}},
     "reference_reals": null or {"set": set, "why": text},     # whose real images are the reference
     "trained_on": [set, ...]}     # of these sets those that the checkpoint was trained on

A set that is only there for its real images is not in `sets`, and only its real images have rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.score import Scores, probability
from sharding.format import SAMPLES_SCHEMA, ShardSet, codes_of, numbers_of, table_from
from storage import write_atomically

SCORES_VERSION = 2
SCORES_FILE = "scores.parquet"

_name = pa.dictionary(pa.int32(), pa.string())
SCORES_SCHEMA = pa.schema(
    [
        ("set", _name),
        *(SAMPLES_SCHEMA.field(name) for name in (
            "key", "sha256", "source", "generator", "split", "group", "origin", "label",
        )),
        ("logit", pa.float32()),  # of fake minus real, before the temperature; null if not valid
        ("probability", pa.float64()),  # of fake, after the temperature; null if not valid
        ("valid", pa.bool_()),  # False where the image could not be decoded
        ("error", _name),  # why not; empty where valid
    ]
)  # fmt: skip


class ScoresError(ValueError):
    """A file of scores that cannot be used; the message says what was found."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """The rows (`SCORES_SCHEMA`) and the evaluation they belong to (see the module)."""

    table: pa.Table
    evaluation: Mapping[str, Any]

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers; NaN where it is null."""
        column = self.table.column(name)
        return numbers_of(column.fill_null(float("nan")) if column.null_count else column)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of text as (int32 code per row, names)."""
        column = self.table.column(name)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        return codes_of(column)


def rows_of(name: str, shards: ShardSet, scores: Scores, temperature: float) -> pa.Table:
    """The rows of set `name`, one per sample of `shards` and in its order.

    Raises:
        ValueError: scores and failures together are not the samples of `shards` (our bug).
    """
    covered = np.sort(np.concatenate([scores.samples, [*scores.failures]]).astype(np.int64))
    if not np.array_equal(covered, np.arange(len(shards))):
        raise ValueError(f"{len(covered)} scores for the {len(shards)} samples of {name}")
    logits = np.zeros(len(shards), np.float32)
    logits[scores.samples] = scores.logits
    valid = np.ones(len(shards), np.bool_)
    valid[[*scores.failures]] = False
    reasons = ["", *dict.fromkeys(scores.failures[s] for s in sorted(scores.failures))]
    errors = np.zeros(len(shards), np.int32)
    for sample, reason in scores.failures.items():
        errors[sample] = reasons.index(reason)
    columns = {
        "set": _constant(name, len(shards)),
        "logit": _floats(logits, valid),
        "probability": _floats(probability(logits, temperature), valid),
        "valid": pc.cast(_array(valid.view(np.uint8)), pa.bool_()),
        "error": pa.DictionaryArray.from_arrays(_array(errors), reasons),
    }
    return pa.table(
        [columns.get(field.name, _column(shards, field.name)) for field in SCORES_SCHEMA],
        schema=SCORES_SCHEMA,
    )


def _column(shards: ShardSet, name: str) -> pa.ChunkedArray | None:
    return shards.table.column(name) if name in shards.table.column_names else None


def _array(values: np.ndarray) -> pa.Array:
    """A NumPy array as an Arrow array; not by `pyarrow.array`, which imports pandas."""
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)]
    )


def _floats(values: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Null where not valid."""
    column = _array(np.ascontiguousarray(values))
    return pc.if_else(pc.cast(_array(valid.view(np.uint8)), pa.bool_()), column, None)


def _constant(name: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(_array(np.zeros(count, np.int32)), [name])


def write_scores(path: Path, parts: Sequence[pa.Table], evaluation: Mapping[str, Any]) -> None:
    """Write `parts` (of `rows_of`) to `path`. The same rows and the same
    evaluation give the same bytes.
    """
    text = json.dumps({"scores_version": SCORES_VERSION, **evaluation})
    table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
    table = table.replace_schema_metadata({"evaluation": text})
    write_atomically(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def read_scores(path: Path) -> ScoreTable:
    """Read what `write_scores` wrote.

    Raises:
        ScoresError: not such a file, or another version.
    """
    try:
        table = table_from(path.read_bytes())
        evaluation = json.loads((table.schema.metadata or {})[b"evaluation"])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ScoresError(
            f"{path} is not a file of scores that evaluate.py wrote ({error})"
        ) from error
    if evaluation.get("scores_version") != SCORES_VERSION:
        raise ScoresError(
            f"{path} has scores version {evaluation.get('scores_version')}, expected "
            f"{SCORES_VERSION}; measure the checkpoint again with evaluate.py"
        )
    return ScoreTable(table.select(SCORES_SCHEMA.names).cast(SCORES_SCHEMA), evaluation)
