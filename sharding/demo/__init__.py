"""Synthetic datasets for the demo: procedural scenes, imaged by camera models (real) or by simple
decoders (fake). Main entry: `render.make_demo()`.
"""
