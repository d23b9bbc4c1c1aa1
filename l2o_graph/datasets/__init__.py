"""Data that ships with the package or is found beside it."""
