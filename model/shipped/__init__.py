"""Detectors that ship: the backbone that a head was trained on, fetched and checked."""
