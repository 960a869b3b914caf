"""Calibrate a detector: fit its temperature, thresholds and uncertain band to scores."""
