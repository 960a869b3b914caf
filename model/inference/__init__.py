"""Inference: score image files and read the provenance data that the files contain."""
