"""How batches are made: the settings of a recipe, known without loading what decodes images."""

from dataclasses import dataclass
from typing import Literal

from pipeline.order import Shuffle

Backend = Literal["auto", "dali", "pil"]

STALL_WARNING_S = 60.0
"""How long the consumer waits for one batch before the watchdog says who is at what."""

STALL_ERROR_S = 900.0
"""How long the consumer waits for one batch before the run ends."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How batches are made.

    `batch_size` is per rank. `num_workers` are processes (pil) or threads (dali): 0 decodes in the
    calling process, -1 takes one per processor core, up to 16 (with dali on a GPU fewer, if the
    GPU decodes most of the images). Processes hand their batches over through shared memory, and
    there are no more of them than it holds. A batch that does not come is warned of after
    `stall_warning_s`; after `stall_error_s` it ends the run, unless the calling process decodes.
    `cache` and `cache_gb` are for shards at an address.
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
