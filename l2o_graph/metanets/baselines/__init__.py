"""Baselines for the graph models."""
