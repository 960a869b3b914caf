"""HTTP API that scores uploaded images. Main entry: `python -m serve` (`serve.__main__.main`)."""
