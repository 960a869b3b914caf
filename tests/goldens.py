"""Numbers that no change alters without meaning to, in files: `make golden` writes them anew."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Golden:
    """Compares numbers with those in `folder`, or with `write` puts the new ones there."""

    folder: Path
    write: bool = False

    def check(self, name: str, values: dict[str, Any], rtol: float) -> None:
        """Compare named numbers, or lists of them, with those of the file `name`.json.

        With `write` a file whose numbers hold stays as it is: what another processor or number of
        threads does to the last digit is no change.

        Raises:
            AssertionError: no such file, other names, or numbers further apart than `rtol`.
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
