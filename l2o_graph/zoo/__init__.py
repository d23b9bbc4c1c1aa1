"""Trained learned optimizers, by name."""
