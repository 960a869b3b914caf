"""Before a run: a folder of images as its data, and a few batches tried without a run."""
