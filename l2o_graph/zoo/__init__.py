"""Trained models as files, and nothing else."""
