"""Shipped detectors: fetch and check the backbone that a shipped head needs.

Main entries: `fetch.fetch_backbone()`, `backbone.read_backbone()` and
`trust_list.fetch_trust_list()`.
"""
