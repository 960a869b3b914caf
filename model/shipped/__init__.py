"""Shipped detectors: fetch and check the backbone that a shipped head needs, and
check the `meta.json` of any detector.

Main entries: `fetch.fetch_backbone()`, `backbone.read_backbone()` and `entries.checked()`.
"""
