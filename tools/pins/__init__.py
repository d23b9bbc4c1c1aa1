"""Hashes of what a work tree computes; see ``__main__``."""
