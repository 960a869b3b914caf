"""Read the name of a device that computes.

Main entry: `parse_device(name)` returns a pair: the kind, "auto", "cpu" or "cuda", and the number
of the GPU, an int, or None if the name has none. `name` is a text: `auto`, `cpu`, `cuda` or
`cuda:N`, where N has at most four digits, or a `torch.device` of such a name. Any other name raises
`ValueError`. Whether the device exists is not checked: only the library that computes knows.
`device_here(name, local)` asks torch, and returns torch's name of the device.

`cores()` returns the number of processor cores that this process may use.
"""

import os
import re
import sys

_NAME = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


def parse_device(name: object) -> tuple[str, int | None]:
    """Return the kind and the number of a device: `cuda:1` is ("cuda", 1), `cuda` ("cuda", None).

    Raises:
        ValueError: the name is not `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    text = str(name)
    if not _NAME.fullmatch(text):
        raise ValueError(f"no such device: {text}; use auto, cpu, cuda or cuda:N")
    kind, _, number = text.partition(":")
    return kind, int(number) if number else None


def device_here(asked: object, local: int = 0) -> str:
    """Return torch's name of the device for `asked`: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` is
    the CUDA device with the index `local` if there is one, else the CPU.

    Raises:
        ValueError: `asked` is not one of these four, or this machine has no such device.
    """
    import torch

    kind, number = parse_device(asked)
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if kind == "auto":
        return f"cuda:{local}"
    if not torch.cuda.is_available():
        raise ValueError(f"--device {asked}, but there is no CUDA device here; use cpu or auto")
    count = torch.cuda.device_count()
    if number is not None and number >= count:
        raise ValueError(f"no device {asked} here; number of CUDA devices: {count}, from cuda:0")
    return "cuda" if number is None else f"cuda:{number}"


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
