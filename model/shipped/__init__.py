"""Shipped detectors: fetch and check the backbone that a shipped head needs."""
