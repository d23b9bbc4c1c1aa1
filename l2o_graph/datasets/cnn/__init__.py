"""Datasets of trained CNNs with their test accuracies."""
