"""Layers and networks that read neural graphs and weight spaces."""
