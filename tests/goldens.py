"""Golden values: numbers in files that must not change by accident. `make golden` rewrites them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Golden:
    """Compare numbers with the files in `folder`, or with `write` rewrite the files."""

    folder: Path
    write: bool = False

    def check(self, name: str, values: dict[str, Any], rtol: float) -> None:
        """Compare named numbers, or lists of numbers, with the file `name`.json.

        With `write`, a file whose numbers agree within `rtol` stays unchanged: differences in the
        last digit come from the processor or the number of threads.

        Raises:
            AssertionError: no such file, different names, or a difference of more than `rtol`.
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
        where = f"{path.name}: {key}; where this is meant, `make golden` writes the new numbers"
        np.testing.assert_allclose(value, expected[key], rtol=rtol, err_msg=where)
