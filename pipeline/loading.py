"""Define the settings of the loader: the `[loading]` table of a recipe.

Main entry: `Loading(...)`, a frozen dataclass. All fields are keywords and may be left out; the
default is in parentheses:

- `batch_size`: images per rank and step, at least 1 (32).
- `num_workers`: processes (Pillow) or threads (DALI) that decode, at least -1. 0: the training
  process decodes (DALI: one thread). -1: one per core, at most 16 (-1). With Pillow, fewer if
  shared memory has no room for them.
- `backend`: the decoder and augmenter: "dali", "pil" for Pillow, or "auto": DALI on a GPU if it is
  installed, else Pillow ("auto").
- `shuffle`: "global" shuffles all samples; "block", for shards at an address, shuffles runs of
  successive samples ("global").
- `verify_checksums`: whether every image's SHA-256 is compared with the index (False), also of sets
  on this machine. Those of a set at an address always are.
- `cache`: folder on this machine for the cache of shards at an address, a text ("data/cache").
- `cache_gb`: size of this cache in GB, above 0 (20).
- `stall_warning_s`: seconds without a batch before a warning, above 0 (60, `STALL_WARNING_S`).
- `stall_error_s`: seconds without a batch before the run ends, above 0 (900, `STALL_ERROR_S`). Not
  used if the training process decodes with Pillow.

It raises ValueError for a number out of range and a cache at an address. Other texts and NaN are
not checked here, but by `recipes.load()`. This module imports no image decoder, so that recipes are
read without one.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.order import Shuffle
from storage import local_path

Backend = Literal["auto", "dali", "pil"]

STALL_WARNING_S = 60.0
"""Seconds to wait for a batch before logging each worker's current stage."""

STALL_ERROR_S = 900.0
"""Seconds to wait for a batch before the run ends with an error."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Reading and decoding of images, and batches."""

    batch_size: int = 32
    """Images per GPU (rank) and step. Range: at least 1"""
    num_workers: int = -1
    """Processes (pil) or threads (dali) that decode. 0: the training process decodes. -1: one per
    core, at most 16. With pil, shared memory limits their number. Range: at least -1"""
    backend: Backend = "auto"
    """Library that decodes and augments. `auto`: dali on a GPU, else pil."""
    shuffle: Shuffle = "global"
    """`global` shuffles all samples. `block`, for shards at an address, reads runs of 256
    successive samples and mixes 64 runs at a time."""
    verify_checksums: bool = False
    """Compare the SHA-256 of every image with the index. Images from an address are always
    compared.
    """
    cache: str = "data/cache"
    """Cache folder for parts of shards at an address."""
    cache_gb: float = 20.0
    """Largest size of the cache in GB. The least recently used parts are removed. Range: above 0"""
    stall_warning_s: float = STALL_WARNING_S
    """Seconds without a batch after which each worker's current stage is logged. Range: above 0"""
    stall_error_s: float = STALL_ERROR_S
    """Seconds without a batch after which the run ends, unless the training process itself decodes.
    Range: above 0"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < -1:
            raise ValueError(f"num_workers must be at least -1, got {self.num_workers}")
        for name in ("cache_gb", "stall_warning_s", "stall_error_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
        try:
            local_path(self.cache)
        except ValueError as error:
            raise ValueError(f"cache must be a folder: {error}") from error
