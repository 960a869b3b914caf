"""Make aligned pairs: each real image of a set and its reconstruction by a VAE, as a raw dataset.

Main entry: `run.make_pairs()`.
"""
