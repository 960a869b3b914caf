"""Load shard sets as batches on a device: uint8 images, labels, and the source of each sample.

Main entries: `pipeline.loader.open_loader()` for the loader, `pipeline.stream` for its batches:

    loader = open_loader(
        open_shards([folder]), preprocess=Preprocess(), loading=Loading(), device=device
    )
    with contextlib.closing(loader):
        for batch in evaluation_batches(loader):  # a `pipeline.batch.Batch`
            ...
"""
