"""The HTTP API: `python -m serve`."""
