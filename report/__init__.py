"""An evaluation as a person reads it: in a terminal, as CSV, and as one offline HTML page.

`report.json` and `scores.parquet` in (`model/evaluation/report.py` describes them); nothing is
measured here that they do not hold.
"""
