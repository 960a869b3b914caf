"""Shards in, batches on the device out: uint8 images, labels, and where each sample came from.

loader = open_loader(shards, view=View(), loading=Loading(), device=device)
epoch = evaluation_epoch(len(shards), loader.global_batch)
for batch in loader.batches(epoch, draw_centre(shards, view)): ...
"""

from pipeline.augment import Augment, Draw, View
from pipeline.batch import Batch
from pipeline.loader import Loader, Loading, draw_by_law, draw_centre, open_loader
from pipeline.order import check_state, evaluation_epoch, state_of, training_epoch
from pipeline.replay import Replay, draw_old

__all__ = [
    "Augment",
    "Batch",
    "Draw",
    "Loader",
    "Loading",
    "Replay",
    "View",
    "check_state",
    "draw_by_law",
    "draw_centre",
    "draw_old",
    "evaluation_epoch",
    "open_loader",
    "state_of",
    "training_epoch",
]
