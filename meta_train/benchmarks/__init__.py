"""Benchmarks of optimizers and of their cost, and result tables of weight-space models."""
