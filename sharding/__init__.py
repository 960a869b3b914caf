"""Convert folders of raw images to WebDataset tar shards with an index.

Main entry: `sharding.build.build()`, or `python -m sharding build` in a terminal.
"""
