"""Training: a recipe in, checkpoints out."""
