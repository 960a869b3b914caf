"""The history of a run: write it, send it to experiment trackers, and plot it as curves. Main
entries: `history.History`, `tracker.Tracker` and `curves.draw`.
"""
