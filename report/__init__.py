"""An evaluation as a person reads it: in a terminal, as CSV, and as one offline HTML page.

`report.json` and `scores.parquet` in (`model/evaluation.py` describes them); nothing is measured
here that they do not hold.
"""

from report.page import render, write_page
from report.tables import table_csv, write_tables, write_text

__all__ = ["render", "table_csv", "write_page", "write_tables", "write_text"]
