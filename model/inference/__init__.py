"""Inference: score image files, and read what their metadata says of their origin."""
