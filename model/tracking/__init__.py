"""Trackers: programs that draw the figures of runs."""
