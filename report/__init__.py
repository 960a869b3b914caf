"""Show an evaluation in a terminal, as CSV tables and as an offline HTML page.

Reads `report.json` and `scores.parquet` (described in `model/evaluation/report.py`) and computes no
new metrics. Main entries: `files.write_report()` and `terminal.print_report()`.
"""
