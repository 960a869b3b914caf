"""Keep verdicts that a person calls wrong in a local folder, and measure them with new detectors.

Main entries: `add.keep_wrong()`, `regressions.measure_again()`.
"""
