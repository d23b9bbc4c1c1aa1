"""Datasets: images, and sets of trained networks."""
