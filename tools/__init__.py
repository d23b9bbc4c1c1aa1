"""Tools for who works on the package; not part of it."""
