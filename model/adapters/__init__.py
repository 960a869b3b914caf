"""Third-party detectors with the interface of this project's detectors: Hugging Face Hub
repositories, timm models and Python files. Main entry: `open.load_any()`. See `docs/detectors.md`.
"""
