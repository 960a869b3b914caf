"""Synthetic datasets: scenes, and what a camera model and simple decoders make of them."""
