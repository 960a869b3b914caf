"""Raw images in, WebDataset tar shards and an index out: `python -m sharding build`."""
