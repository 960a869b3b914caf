"""Shortcut report of a shard set: can a model predict the label from metadata, without pixels?

Main entries: `audit.audit()`, `match.match_classes()` and `histograms.draw()`.
"""
