"""Settings of the loader: the `[loading]` part of a recipe. Main entry: `Loading`.

This module imports no image decoder, so that recipes are read without one.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.order import Shuffle

Backend = Literal["auto", "dali", "pil"]

STALL_WARNING_S = 60.0
"""Seconds to wait for a batch before logging each worker's current stage."""

STALL_ERROR_S = 900.0
"""Seconds to wait for a batch before the run ends with an error."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Settings of the loader.

    `batch_size` is images per rank. `num_workers` is the number of processes (pil) or threads
    (dali): 0 decodes in the calling process, -1 takes one per CPU core, at most 16. Worker
    processes pass batches through shared memory, so their number is reduced to what shared memory
    has room for.

    `backend` "auto" is dali with a CUDA device and DALI, else pil. `shuffle` "block" is for shards
    at an address (`pipeline/order.py`), as are `cache` (folder) and `cache_gb` (10^9 bytes).
    `verify_checksums` compares the SHA-256 of every image.

    After `stall_warning_s` seconds without a batch, each worker's stage is logged. After
    `stall_error_s` seconds the run ends, unless the calling process decodes.

    Raises:
        ValueError: a number outside its range.
    """

    batch_size: int = 32
    num_workers: int = -1
    backend: Backend = "auto"
    shuffle: Shuffle = "global"
    verify_checksums: bool = False
    cache: str = "data/cache"
    cache_gb: float = 20.0
    stall_warning_s: float = STALL_WARNING_S
    stall_error_s: float = STALL_ERROR_S

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers < -1:
            raise ValueError(f"num_workers must be at least -1, got {self.num_workers}")
        for name in ("cache_gb", "stall_warning_s", "stall_error_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0, got {getattr(self, name)}")
