"""Read the name of a device that computes.

Main entry: `parse_device(name)` returns a pair: the kind, "auto", "cpu" or "cuda", and the number
of the GPU, an int, or None if the name has none. `name` is a text: `auto`, `cpu`, `cuda` or
`cuda:N`, where N has at most four digits. Another text raises `ValueError`. Whether the device
exists is not checked: only the library that computes knows.
"""

import re

_NAME = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


def parse_device(name: str) -> tuple[str, int | None]:
    """Return the kind and the number of a device: `cuda:1` is ("cuda", 1), `cuda` ("cuda", None).

    Raises:
        ValueError: the name is none of `auto`, `cpu`, `cuda` and `cuda:N`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"no such device: {name}; use auto, cpu, cuda or cuda:N")
    kind, _, number = name.partition(":")
    return kind, int(number) if number else None
