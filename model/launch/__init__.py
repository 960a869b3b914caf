"""Steps before a training run: pack a folder of images as its data, and try a few batches."""
