"""Aligned pairs: each real image of a set, and the same image through a VAE."""
