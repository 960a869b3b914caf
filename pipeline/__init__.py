"""Shards in, batches on the device out: uint8 images, labels, and where each sample came from.

loader = open_loader(open_shards([folder]), preprocess=Preprocess(), loading=Loading(),
device=device) for batch in evaluation_batches(loader): ...
"""
