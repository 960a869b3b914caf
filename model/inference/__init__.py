"""Inference: image files in, verdicts and what each file says of itself out."""
