"""Supervised training of models that read networks."""
