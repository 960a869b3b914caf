"""Detectors of others behind the interface of our own: hub repositories, timm models and Python
files. `docs/detectors.md` is the page about them.
"""
