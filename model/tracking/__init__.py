"""Show the history of a run: experiment trackers that receive its figures, and plotted curves. Main
entries: `tracker.Tracker` and `curves.draw`.
"""
