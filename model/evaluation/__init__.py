"""Evaluate a detector: score shard sets and report metrics with 95 % intervals."""
