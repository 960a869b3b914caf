"""Choose the device and the floating-point precision of a computation.

Main entries: `choose_device(asked, local)` takes `asked`, a text or a `torch.device`, and returns a
`torch.device`.

- `auto`: the GPU with the index `local` (default 0, not checked), or the CPU if there is no GPU.
- `cpu`, `cuda` or `cuda:N`: this device. `local` is not used.
- Another text, such as `cpu:0`, raises `ValueError`, and so does a named GPU that this machine does
  not have.

`choose_precision(asked, device)` takes a text and a `torch.device`. It returns a pair: the torch
dtype and the reason for the choice, as text.

- `auto`: on a GPU that computes in bf16, bf16; on another GPU with tensor cores, fp16; else fp32.
- `bf16`, `fp16` or `fp32`: this precision, on any device.
- Another text raises `ValueError`.

`choose_compile(asked, device)` takes `auto`, `on` or `off`. It returns whether torch.compile is
used, and the reason. `auto` uses it on a GPU where Triton, a C compiler and Python's headers are
installed. It raises `ValueError` if `asked` is `on` and something of this is missing.

`describe(dtype)` returns the short name (`bf16`, `fp16` or `fp32`) of one of these dtypes.
`keep_freed_memory(device)` makes computation on a CPU faster, by not returning freed memory to the
system; for a GPU, or without glibc, it does nothing. `one_thread(active)` is a context manager: in
its block torch computes with one CPU thread, if `active` (default True). In the block of
`half_of_threads()` it computes with half of its CPU threads.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from devices import device_here

# Values of glibc's malloc.h; Python has no names for them.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def choose_device(asked: str | torch.device, local: int = 0) -> torch.device:
    """Return the device of `devices.device_here`, which raises `ValueError` if there is none."""
    return torch.device(device_here(asked, local))


def choose_precision(asked: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype for mixed precision and the reason. `auto` is bf16 where the GPU supports
    it, else fp16, else fp32.

    Raises:
        ValueError: `asked` is none of `auto`, `bf16`, `fp16` and `fp32`.
    """
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if asked in named:
        return named[asked], "asked for"
    if asked != "auto":
        raise ValueError(f"no such precision: {asked}; use auto, bf16, fp16 or fp32")
    if device.type != "cuda":
        return torch.float32, f"no mixed precision on {device.type}"
    with torch.cuda.device(device):  # the check below asks the current GPU
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if has_bf16:
        return torch.bfloat16, "the GPU computes in bf16"
    if torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16, "the GPU has tensor cores but no bf16"
    return torch.float32, "the GPU has no tensor cores"


def describe(dtype: torch.dtype) -> str:
    """Return `bf16`, `fp16` or `fp32`."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def choose_compile(asked: str, device: torch.device) -> tuple[bool, str]:
    """Return whether torch.compile is used for `asked` (auto, on or off), and the reason. `auto` is
    off on a GPU where torch.compile lacks what it needs.

    Raises:
        ValueError: `asked` is on, and torch.compile lacks what it needs.
    """
    if asked == "off":
        return False, "asked for"
    missing = _missing_for_compile(device)
    if asked == "on":
        if missing:
            raise ValueError(f"run.compile=on, but {missing}; or set run.compile=off")
        return True, "asked for"
    if device.type != "cuda":
        return False, "auto uses it on GPUs only"
    return not missing, missing or "faster on cuda"


def _missing_for_compile(device: torch.device) -> str:
    """Return what torch.compile lacks on this machine and how to get it, empty if nothing.

    Its code for a CPU is C++. For a GPU it is Triton's, whose launcher is C. Both include Python.h.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs the package triton, which is not installed"
    language, variable, names = "C++", "CXX", ("g++", "clang++")
    if device.type == "cuda":
        language, variable, names = "C", "CC", ("gcc", "clang")
    if not os.environ.get(variable) and not any(map(shutil.which, names)):
        return (
            f"torch.compile needs a {language} compiler, and there is no {' or '.join(names)}: "
            f"install one, or name yours in {variable}"
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return (
            f"torch.compile needs Python's headers, and there is no {header}: install python3-dev"
        )
    return ""


@contextlib.contextmanager
def one_thread(active: bool = True) -> Iterator[None]:
    """Let torch compute with one CPU thread in the block, if `active`, and then as before.

    A step of a head on stored features takes 2 ms. Threads that share it wait for each other: with
    two threads a step took 13 ms on two free cores, and 65 ms beside another program (docs/log.md).
    """
    with _threads(1 if active else torch.get_num_threads()):
        yield


@contextlib.contextmanager
def half_of_threads() -> Iterator[None]:
    """Let torch compute with half of its CPU threads, at least one, and then as before.

    A fit of a head waits for memory, which half of the threads can keep busy. With all of them, a
    core that another program uses holds up every sum: on two cores a fit took 1.4 to 5 s with two
    threads and 1.4 s with one, and 1.1 s with two on free cores (docs/log.md).
    """
    with _threads(max(1, torch.get_num_threads() // 2)):
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU with glibc, keep freed memory in the process instead of returning it to the system.

    Every step allocates and frees its activations. Mapping that memory again costs a page fault per
    4 kB, which was 40 % of a training step (13 instead of 25 images/s, docs/log.md).
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
