"""Scores that the detectors of other people gave, as the scores of an evaluation.

Main entry: `csv_table.read_scores()`. See `docs/detectors.md`.
"""
