"""Shards in, batches on the device out: uint8 images, labels, and where each sample came from.

loader = open_loader(open_shards([folder]), view=View(), loading=Loading(), device=device)
for batch in evaluation_batches(loader): ...
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.augment import Augment, Draw, View
    from pipeline.batch import Batch
    from pipeline.loader import Loader, Loading, open_loader
    from pipeline.meter import Meter
    from pipeline.replay import Replay
    from pipeline.stream import Pool, Stream, evaluation_batches, open_pool

_HOMES = {
    "Augment": "pipeline.augment",
    "Draw": "pipeline.augment",
    "View": "pipeline.augment",
    "Batch": "pipeline.batch",
    "Loader": "pipeline.loader",
    "Loading": "pipeline.loader",
    "open_loader": "pipeline.loader",
    "Meter": "pipeline.meter",
    "Replay": "pipeline.replay",
    "Pool": "pipeline.stream",
    "Stream": "pipeline.stream",
    "evaluation_batches": "pipeline.stream",
    "open_pool": "pipeline.stream",
}

__all__ = [
    "Augment",
    "Batch",
    "Draw",
    "Loader",
    "Loading",
    "Meter",
    "Pool",
    "Replay",
    "Stream",
    "View",
    "evaluation_batches",
    "open_loader",
    "open_pool",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: `pipeline.augment` must come without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
