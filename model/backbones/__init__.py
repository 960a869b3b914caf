"""Backbones: timm's record of their weights, and the heads that classify their features."""
