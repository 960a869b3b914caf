"""Experiment trackers that receive the figures of runs. Main entry: `tracker.Tracker`."""
