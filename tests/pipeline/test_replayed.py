"""The record of replayed samples in a training state, which may be of somebody else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.order import OrderError

WRONG_RECORDS: dict[str, Callable[[Any], Any]] = {
    "no record": lambda _good: [1, 2],
    "a part": lambda good: {"epochs": 2, "samples": good["samples"]},
    "a text": lambda good: good | {"epochs": "2"},
    "epochs below 0": lambda good: good | {"epochs": -2},
    "a list": lambda good: good | {"samples": good["samples"].tolist()},
    "fractions": lambda good: good | {"samples": good["samples"].double()},
    "long counts": lambda good: good | {"counts": good["counts"].long()},
    "sparse": lambda good: good | {"counts": good["counts"].to_sparse()},
    "one count": lambda good: good | {"counts": good["counts"][:1]},
    "a table": lambda good: good | {n: good[n][None] for n in ("samples", "counts")},
    "rows of other sets": lambda good: good | {"samples": good["samples"] + 10**6},
    "rows below 0": lambda good: good | {"samples": good["samples"] - 10**6},
    "new samples": lambda good: good | {"samples": torch.arange(1), "counts": good["counts"][:1]},
    "twice a row": lambda good: good | {"samples": good["samples"] * 0 + good["samples"][0]},
    "counts of 0": lambda good: good | {"counts": 0 * good["counts"]},
    "too many": lambda good: good | {"counts": good["counts"] + 2**30},
    "without end": lambda good: (
        good
        | {
            "samples": good["samples"][:1].expand(10**15),
            "counts": good["counts"][:1].expand(10**15),
        }
    ),
}


@pytest.mark.parametrize("name", WRONG_RECORDS)
def test_a_wrong_record_of_replayed_samples_is_refused(make_stream: Callable, name: str) -> None:
    stream = make_stream(ratio="1:2")
    list(stream.replayed_until(2 * stream.steps_per_epoch))
    good = stream.replayed_state()
    resumed = make_stream(ratio="1:2")
    with pytest.raises(OrderError, match=r"record of replayed .* is not of this run .*--run"):
        resumed.keep_replayed(WRONG_RECORDS[name](good))
    resumed.keep_replayed(good)
