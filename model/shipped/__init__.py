"""Shipped detectors: fetch and check the backbone that a shipped head needs.

Main entries: `fetch.fetch_backbone()` and `backbone.read_backbone()`.
"""
