"""Compare numbers with golden values in files, so that no change alters the numbers unnoticed.

Main entry: `Golden.check()`. `make golden` writes the files. `check_printed()` compares an output
with the one that a page shows.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OTHER_PROCESSOR = 0.002
"""How far a probability may be from the one that a page shows: processors round differently."""


@dataclass(frozen=True)
class Golden:
    """Golden values in `folder`. With `write`, new values are written instead of compared."""

    folder: Path
    write: bool = False

    def check(self, name: str, values: dict[str, Any], rtol: float) -> None:
        """Compare named numbers, or lists of numbers, with those in the file `name`.json.

        With `write`, a file is not rewritten if its numbers are within `rtol`: another processor or
        number of threads changes the last digits.

        Raises:
            AssertionError: the file is missing, the names differ, or a number differs by more than
                `rtol`.
        """
        path = self.folder / f"{name}.json"
        try:
            _compare(path, values, rtol)
        except AssertionError:
            if not self.write:
                raise
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _compare(path: Path, values: dict[str, Any], rtol: float) -> None:
    assert path.exists(), f"no golden values at {path}; write them with `make golden`"
    expected = json.loads(path.read_text(encoding="utf-8"))
    assert values.keys() == expected.keys(), path.name
    for key, value in values.items():
        where = f"{path.name}: {key}; if this change is intended, run `make golden`"
        np.testing.assert_allclose(value, expected[key], rtol=rtol, err_msg=where)


def check_printed(actual: str, shown: str) -> None:
    """Compare an output with the one on a page; a probability may be `OTHER_PROCESSOR` apart.

    Raises:
        AssertionError: a probability differs by more, or anything else differs.
    """
    probability = r"\b0\.\d{3}\b"
    assert re.sub(probability, "PROBABILITY", actual) == re.sub(probability, "PROBABILITY", shown)
    values, expected = (np.array(re.findall(probability, text), float) for text in (actual, shown))
    np.testing.assert_allclose(values, expected, rtol=0, atol=OTHER_PROCESSOR)
