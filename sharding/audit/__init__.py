"""Shortcuts in a shard set: what a model could learn without looking at pixels."""
