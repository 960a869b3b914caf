"""Shards in, batches on the device out: uint8 images, labels, and where each sample came from.

loader = open_loader(open_shards([folder]), view=View(), loading=Loading(), device=device)
for batch in evaluation_batches(loader): ...
"""

from pipeline.augment import Augment, Draw, View
from pipeline.batch import Batch
from pipeline.loader import Loader, Loading, open_loader
from pipeline.meter import Meter
from pipeline.replay import Replay
from pipeline.stream import Pool, Stream, evaluation_batches, open_pool

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
