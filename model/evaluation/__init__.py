"""Evaluation: scores of shard sets in, a report with intervals out."""
